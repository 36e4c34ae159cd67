# docker build --target cpu -t adapterhub .       docker build --target cuda -t adapterhub:cuda .
# The install step is the one `make setup` uses.
FROM python:3.11-slim AS source
# The engine compiles its CPU kernels at the first start; without a compiler it runs, several times slower.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home adapterhub && install -d -o adapterhub /data
ENV PATH=/opt/venv/bin:$PATH ADAPTERHUB_HOME=/data PIP_NO_CACHE_DIR=1
EXPOSE 8000 8089
ENTRYPOINT ["adapterhub"]
WORKDIR /opt/adapterhub
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY adapterhub adapterhub
COPY train train
COPY serve serve

FROM source AS cpu
RUN TORCH=cpu scripts/install.sh /opt/venv
USER adapterhub
WORKDIR /home/adapterhub
VOLUME /data

# torch's own wheels carry the CUDA libraries; the host needs the driver and the NVIDIA container toolkit.
FROM source AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all
RUN TORCH=cuda scripts/install.sh /opt/venv
USER adapterhub
WORKDIR /home/adapterhub
VOLUME /data
