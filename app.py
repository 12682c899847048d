"""VRAM Planner's pages: `streamlit run app.py`."""

import streamlit as st

from planner.dashboard.inputs import sidebar

st.set_page_config(
    page_title="VRAM Planner",
    page_icon="planner/dashboard/favicon.svg",
    layout="wide",
    initial_sidebar_state=320,
)
pages = [
    st.Page("planner/dashboard/plan.py", title="Plan", icon=":material/memory:", default=True),
    st.Page("planner/dashboard/measure.py", title="Measure", icon=":material/speed:"),
    st.Page("planner/dashboard/accuracy.py", title="Accuracy", icon=":material/target:"),
    st.Page("planner/dashboard/sweeps.py", title="Sweeps", icon=":material/dataset:"),
    st.Page("planner/dashboard/method.py", title="Method", icon=":material/function:"),
]
page = st.navigation(pages, position="top")
st.set_page_config(page_title=f"{page.title} | VRAM Planner")
sidebar()
page.run()
