# The service as an image: docker build -t flash-sale . && docker run -p 8000:8000 -v sale:/data flash-sale
# Base images and their Python change; deploy/constraints.txt names the packages' exact versions.
ARG BASE=python:3.13-slim
FROM ${BASE}

WORKDIR /app
COPY requirements.txt requirements.txt
COPY postgres/requirements.txt postgres/requirements.txt
COPY deploy/constraints.txt deploy/constraints.txt
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --only-binary :all: \
        -r requirements.txt -r postgres/requirements.txt -c deploy/constraints.txt

# An ordinary user with a fixed number: a folder that is mounted on /data has to be writable for it.
RUN groupadd --gid 10001 sale \
    && useradd --uid 10001 --gid sale --no-create-home --shell /usr/sbin/nologin sale \
    && install -d -o sale -g sale -m 0700 /data
COPY . .
RUN python3 -m compileall -q . || true
USER 10001:10001

# The database and its -wal and -shm lie together in a folder: mount that, never the file alone.
# A relative DATABASE_URL starts there too.
VOLUME /data
WORKDIR /data
ENV DATABASE_URL=sqlite:////data/sale.db HOST=0.0.0.0 PORT=8000 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=10s CMD ["/venv/bin/python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health')"]

# gunicorn answers everybody who waits before it ends, and needs LOCK_TIMEOUT + 50 s at most.
STOPSIGNAL SIGTERM
CMD ["/venv/bin/gunicorn", "--config", "/app/gunicorn.conf.py", "app:app"]
