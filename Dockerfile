# Two images of the page:
#   docker build --target web  -t vram-planner:web .    estimates only, no torch
#   docker build --target full -t vram-planner:full .   everything in requirements.txt
# Both: docker run --rm -p 8501:8501 vram-planner:web

FROM python:3.11.14-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    STREAMLIT_SERVER_ADDRESS=0.0.0.0 \
    STREAMLIT_SERVER_PORT=8501 \
    STREAMLIT_SERVER_HEADLESS=true \
    STREAMLIT_SERVER_FILE_WATCHER_TYPE=none \
    STREAMLIT_BROWSER_GATHER_USAGE_STATS=false
# A user of its own with a home for Hugging Face's cache; the code below stays root's and read-only.
RUN useradd --create-home --uid 10001 --shell /usr/sbin/nologin planner
WORKDIR /app
COPY constraints.txt requirements-web.txt ./
RUN pip install --no-cache-dir -r requirements-web.txt
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['STREAMLIT_SERVER_PORT']}/_stcore/health\", timeout=4)"]
CMD ["streamlit", "run", "app.py"]

FROM base AS web
COPY .streamlit .streamlit
COPY planner planner
COPY app.py ./
USER 10001

FROM base AS full
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY .streamlit .streamlit
COPY planner planner
COPY app.py ./
USER 10001
