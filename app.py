"""VRAM Planner's pages: `streamlit run app.py`."""

import streamlit as st

from planner.dashboard.inputs import sidebar

st.set_page_config(
    page_title="VRAM Planner",
    page_icon="planner/dashboard/favicon.svg",
    layout="wide",
    initial_sidebar_state="auto",
)
pages = [
    st.Page("planner/dashboard/plan.py", title="Plan", icon=":material/memory:", default=True),
]
page = st.navigation(pages, position="top")
sidebar()
page.run()
