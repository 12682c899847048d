"""The pages: the only code that imports streamlit, plotly and pandas. Nothing here computes memory."""
