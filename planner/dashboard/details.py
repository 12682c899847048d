"""The lower half of the Plan page: grid, changes, cards, waterfall, disk space, what is not counted."""

from __future__ import annotations

import streamlit as st

from planner.advise import Change, changes, grid, nearest_fitting, smallest_gpu
from planner.compare import Storage, storage
from planner.dashboard import every_method, figures, grid as squares, simulating, state, tables
from planner.dashboard.answers import Answer, cards
from planner.dashboard.links import MOST_TASKS, TASKS
from planner.dashboard.steps import steps_alt, steps_figure, steps_table
from planner.dashboard.words import NOT_COUNTED, method_title, peak_place, plain
from planner.units import gib, percent

__all__ = ["beside_the_table", "details", "nearest_change"]

_GRID_KEY = "_grid"


def details(shown: Answer) -> None:
    """Draw every section under the first figure."""
    left, right = st.columns(2, gap="large")
    with left:
        _grid(shown)
    with right:
        _changes(shown)
    left, right = st.columns(2, gap="large")
    with left:
        _cards(shown)
    with right:
        if not shown.is_full:
            steps(shown)
        _storage(shown)
    every_method.section(shown)
    _not_counted(shown)


def nearest_change(shown: Answer) -> None:
    """Where the run does not surely fit: the cheapest change that makes it fit, with its button."""
    if shown.verdict is None or shown.verdict.word not in ("tight", "does not fit"):
        return
    found = nearest_fitting(changes(shown.setup))
    if found is not None:
        _offer(
            f"The nearest change that fits: {_lower(found.words)}, {gib(found.peak_allocated_bytes)}.",
            found.keys,
            key="_apply_nearest",
        )
        return
    card = smallest_gpu(shown.setup)
    if card is not None:
        _offer(
            f"No single change makes it fit. The smallest card that takes it as it is: {card.driver_name}, "
            f"{gib(card.total_bytes)}.",
            {"gpu": card.name},
            key="_apply_nearest",
        )
    else:
        st.markdown(
            ":material/lightbulb: No single change makes it fit, and no card of the catalogue takes it."
        )


def _offer(sentence: str, keys: object, *, key: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f":material/lightbulb: {sentence}", width="stretch")
        st.button("Apply", key=key, on_click=state.apply, args=(keys,))


def _grid(shown: Answer) -> None:
    st.subheader("Micro batch and sequence length", anchor=False)
    if shown.setup.gpu is None or shown.chosen.not_known:
        st.caption(
            "Activations of this model are not known by formula, so the grid would be too good to be true."
        )
        return
    training = shown.setup.training
    cells = grid(
        shown.setup,
        squares.axis("micro_batch_size", training.micro_batch_size),
        squares.axis("seq_len", training.seq_len, shown.setup.model.max_positions),
    )
    current = (training.micro_batch_size, training.seq_len)
    st.caption("GiB on the card, reserve and context included. Click a square to plan it.")
    st.plotly_chart(
        squares.grid_figure(cells, current),
        key=f"{_GRID_KEY}_{current[0]}_{current[1]}",
        on_select=_grid_clicked,
        selection_mode="points",
        config=figures.CONFIG,
        alt=squares.grid_alt(cells),
    )
    with st.expander("The grid as a table", icon=":material/table:"):
        st.html(tables.grid_table(cells))


def _grid_clicked() -> None:
    for name, value in st.session_state.items():
        if str(name).startswith(_GRID_KEY):
            wanted = squares.clicked(value["selection"]["points"])
            if wanted:
                state.apply(wanted)


def _changes(shown: Answer) -> None:
    st.subheader("What to change", anchor=False)
    found = changes(shown.setup)
    if not found:
        st.caption("No change that is known here lowers the peak.")
        return
    st.caption("Sorted by what it costs you, then by what it saves.")
    for position, change in enumerate(found):
        _change(change, position)


def _change(change: Change, position: int) -> None:
    with st.container(border=True, gap="small"):
        st.markdown(f"**{plain(change.words)}**  \n:small[Costs {change.cost}.]")
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            peak, saving = gib(change.peak_allocated_bytes), gib(change.saving_bytes)
            st.markdown(f"{peak}, {saving} less", width="stretch")
            if change.fits is not None:
                _fits_badge(change.fits)
            st.button("Apply", key=f"_apply_{position}", on_click=state.apply, args=(change.keys,))


def _fits_badge(fits: bool) -> None:
    if fits:
        st.badge("Fits", icon=":material/check_circle:", color="green")
    else:
        st.badge("Not enough", icon=":material/remove:", color="gray")


def _cards(shown: Answer) -> None:
    st.subheader("Other cards", anchor=False)
    found = cards(shown.setup)
    smallest, verdict = found[0]  # what fits stands first, from the smallest card up
    if verdict.fits:
        st.caption(
            f"The smallest card that takes this run: {smallest.driver_name}, {gib(smallest.total_bytes)}."
        )
    else:
        st.caption("No single card of the catalogue surely takes this run.")
    st.dataframe(
        tables.cards_table(found),
        hide_index=True,
        height=330,
        column_config={
            "Verdict": st.column_config.TextColumn(width=95),
            "GPU": st.column_config.TextColumn(width=160),
            "Memory, GiB": st.column_config.NumberColumn(width=80, format="%.1f"),
            "At most, GiB": st.column_config.NumberColumn(width=80, format="%.1f"),
        },
        key="_cards",
        alt="Every GPU of the catalogue with the verdict for this setup, what fits first.",
    )


def beside_the_table(shown: Answer) -> None:
    """The waterfall, or the phases where there is nothing to fall from."""
    if shown.is_full:
        steps(shown)
    else:
        waterfall(shown)


def steps(shown: Answer) -> None:
    """Memory over the step, the phase of the peak named; its twin folded."""
    st.subheader("Memory over the step", anchor=False)
    if simulating.steps(shown.setup, shown.chosen, shown.verdict):
        return
    st.caption(f"The peak is in {peak_place(shown.chosen)}. Step 2 stands for every later one.")
    st.plotly_chart(
        steps_figure(shown.chosen, shown.verdict),
        key="_steps",
        config=figures.CONFIG,
        alt=steps_alt(shown.chosen),
    )
    with st.expander("The phases as a table", icon=":material/table:"):
        st.html(steps_table(shown.chosen))


def waterfall(shown: Answer) -> None:
    """From full fine-tuning's peak to the chosen method's; its twin is the table of parts."""
    title = method_title(shown.setup.method.name)
    st.markdown(f"**From full fine-tuning to {title}**")
    st.plotly_chart(
        figures.waterfall(shown.comparison, "Full fine-tuning", title[0].upper() + title[1:]),
        key="_waterfall",
        config=figures.CONFIG,
        alt=figures.waterfall_alt(shown.comparison),
    )


def _storage(shown: Answer) -> None:
    st.subheader("Disk space for several tasks", anchor=False)
    _storage_of(shown)


@st.fragment
def _storage_of(shown: Answer) -> None:
    state.restore(TASKS)
    tasks = st.number_input(
        "Tasks", min_value=1, max_value=MOST_TASKS, value=5, key=TASKS, bind=state.binding(TASKS), width=160
    )
    state.keep(TASKS)
    needed = storage(shown.setup, int(tasks))
    copies = f"{tasks:,} full copies take **{gib(needed.full_copies_bytes)}**"
    if shown.is_full:
        st.markdown(f"{copies}: full fine-tuning stores the whole model for each task.{_to_resume(needed)}")
        return
    st.markdown(
        f"{copies}; one base model ({gib(needed.base_bytes)}) and {tasks:,} x {gib(needed.adapter_bytes)} "
        f"of trained tensors take **{gib(needed.base_and_adapters_bytes)}**, "
        f"{percent(needed.reduction)} less.{_to_resume(needed)}"
    )


def _to_resume(needed: Storage) -> str:
    """What a checkpoint takes beside the weights, where it is known."""
    if needed.optimizer_bytes is None:
        return ""
    return f" To resume a task's run, its optimizer states take {gib(needed.optimizer_bytes)} more."


def _not_counted(shown: Answer) -> None:
    st.subheader("What is not counted", anchor=False)
    st.markdown("\n".join(f"- {line}" for line in (*NOT_COUNTED, *map(plain, shown.chosen.notes))))


def _lower(words: str) -> str:
    return words[0].lower() + words[1:]
