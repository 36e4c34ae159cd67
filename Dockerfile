# docker build --target cpu -t adapterhub .       docker build --target cuda -t adapterhub:cuda .
# The install step is the one `make setup` uses.
FROM python:3.11-slim AS source
# The engine compiles its CPU kernels at the first start; without a compiler it runs, several times slower.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/adapterhub
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY adapterhub adapterhub
COPY train train
COPY serve serve

FROM source AS cpu
RUN TORCH=cpu scripts/install.sh /opt/venv && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH ADAPTERHUB_HOME=/data
RUN useradd --create-home adapterhub && install -d -o adapterhub /data
USER adapterhub
WORKDIR /home/adapterhub
VOLUME /data
EXPOSE 8000 8089
ENTRYPOINT ["adapterhub"]

FROM source AS cuda
# torch's own wheels carry the CUDA libraries; the host needs the driver and the NVIDIA container toolkit.
RUN TORCH=cuda scripts/install.sh /opt/venv && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH ADAPTERHUB_HOME=/data NVIDIA_VISIBLE_DEVICES=all
RUN useradd --create-home adapterhub && install -d -o adapterhub /data
USER adapterhub
WORKDIR /home/adapterhub
VOLUME /data
EXPOSE 8000 8089
ENTRYPOINT ["adapterhub"]
