"""PYTORCH_CUDA_ALLOC_CONF as c10/core/AllocatorConfig.cpp of torch 2.13 reads it."""

from __future__ import annotations

import pytest

from planner.allocator import AllocatorConfig
from planner.errors import SetupError
from planner.units import MIB


def test_defaults_are_those_of_torch() -> None:
    config = AllocatorConfig.parse("")
    assert config == AllocatorConfig()
    assert not config.expandable_segments
    assert config.max_split_size_bytes is config.garbage_collection_threshold is None
    assert config.roundup_power2_divisions is config.max_non_split_rounding_bytes is None
    assert config.large_segment_bytes == 20 * MIB


def test_every_setting_is_read() -> None:
    text = (
        "expandable_segments:True, max_split_size_mb: 128,garbage_collection_threshold:0.8,"
        "max_non_split_rounding_mb:64,large_segment_size_mb:32,per_process_memory_fraction:0.5,"
        "roundup_power2_divisions:4,backend:native,pinned_use_background_threads:True,"
    )
    assert AllocatorConfig.parse(text) == AllocatorConfig(
        expandable_segments=True,
        max_split_size_bytes=128 * MIB,
        garbage_collection_threshold=0.8,
        max_non_split_rounding_bytes=64 * MIB,
        large_segment_bytes=32 * MIB,
        per_process_memory_fraction=0.5,
        roundup_power2_divisions=(4,) * 16,
    )


def test_the_last_of_two_equal_keys_counts() -> None:
    assert not AllocatorConfig.parse("expandable_segments:True,expandable_segments:False").expandable_segments


@pytest.mark.parametrize(
    "text, divisions",
    [
        # the example of test/cpp AllocatorConfigTest: 8 up to 64 MiB, then as listed, 1 above 1024 MiB
        ("[64:8,128:2,256:4,512:2,1024:4,>:1]", (8,) * 7 + (2, 4, 2, 4) + (1,) * 5),
        ("[256:1]", (1,) * 9 + (0,) * 7),
        ("[1:2,>:4]", (2,) + (4,) * 15),
        ("[16:2,64:8]", (2,) * 5 + (0, 8) + (0,) * 9),  # what is not listed in between stays off
    ],
)
def test_divisions_by_size(text: str, divisions: tuple[int, ...]) -> None:
    assert AllocatorConfig.parse(f"roundup_power2_divisions:{text}").roundup_power2_divisions == divisions


@pytest.mark.parametrize(
    "text, message",
    [
        ("expandable_segment:True", "did you mean expandable_segments"),
        ("expandable_segments:true", "True or False, got 'true'"),
        ("expandable_segments", "name:value"),
        ("expandable_segments:", "name:value"),
        ("max_split_size_mb:19", "at least 20"),
        ("max_split_size_mb:-1", "whole number"),
        ("max_split_size_mb:128mb", "whole number"),
        ("large_segment_size_mb:40,max_split_size_mb:39", "at least 40"),
        ("large_segment_size_mb:10", "above 10"),
        ("max_non_split_rounding_mb:19", "at least 20"),
        ("garbage_collection_threshold:0", "between 0 and 1"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:nan", "between 0 and 1"),
        ("garbage_collection_threshold:much", "number from 0 to 1"),
        ("per_process_memory_fraction:1.5", "from 0 to 1"),
        ("roundup_power2_divisions:3", "power of two"),
        ("roundup_power2_divisions:0", "power of two"),
        ("roundup_power2_divisions:[300:2]", "bounds that are powers of two"),
        ("roundup_power2_divisions:[256:3]", "powers of two or 0"),
        ("roundup_power2_divisions:[256]", "whole number"),
        ("roundup_power2_divisions:[256:2", "closing bracket"),
        ("backend:cudaMallocAsync", "not modelled"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        AllocatorConfig.parse(text)
    assert "\n" not in str(caught.value)


def test_fields_are_checked_where_they_enter() -> None:
    with pytest.raises(SetupError, match="16 powers of two"):
        AllocatorConfig(roundup_power2_divisions=(4,))
    with pytest.raises(SetupError, match="max_split_size_mb must be at least 20"):
        AllocatorConfig(max_split_size_bytes=1)


@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:20",
        "max_split_size_mb:19",
        "max_split_size_mb:many",
        "large_segment_size_mb:11",
        "large_segment_size_mb:10",
        "max_split_size_mb:39,large_segment_size_mb:40",
        "max_non_split_rounding_mb:19",
        "max_non_split_rounding_mb:20",
        "garbage_collection_threshold:0.99",
        "garbage_collection_threshold:1.0",
        "roundup_power2_divisions:8",
        "roundup_power2_divisions:0",
        "roundup_power2_divisions:6",
        "roundup_power2_divisions:[256:1,512:2,>:0]",
        "roundup_power2_divisions:[256:6]",
        "roundup_power2_divisions:[300:2]",
        "expandable_segments:True , max_split_size_mb : 64",
        "expandable_segments:true",
        "expandable_segments:1",
    ],
)
def test_torch_agrees_on_what_is_allowed(text: str) -> None:
    """The installed torch's own parser, which works without a GPU, is asked the same."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        pytest.skip("this torch has no settings parser that works without CUDA")
    parse = torch._C._accelerator_setAllocatorSettings
    try:
        parse(text)
        allowed = True
    except ValueError:
        allowed = False
    finally:
        parse("large_segment_size_mb:20")  # the one setting that torch does not reset by itself
    if allowed:
        AllocatorConfig.parse(text)
    else:
        with pytest.raises(SetupError):
            AllocatorConfig.parse(text)
