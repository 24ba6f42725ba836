# A machine with Docker and nothing else: build once, then use the command `atelier` on the files of this folder.
#
#   docker build -t atelier .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" atelier train-ldm -cfg configs/own64_ldm.json
#   docker run --rm --gpus all -p 7860:7860 -v "$PWD:/work" atelier app --host 0.0.0.0
#
# torch's wheels for Linux bring CUDA. For a machine without a GPU, --build-arg TORCH_INDEX=URL names the index of torch's wheels
# for a CPU, which pytorch.org shows under "Get started"; the image is then some gigabytes smaller.
FROM python:3.12-slim

# g++ is for `compile`, which makes C++ on a CPU and asks for a compiler on a GPU, too.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ git \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=""
WORKDIR /atelier
COPY pyproject.toml README.md LICENSE *.py ./
COPY src src
COPY configs configs
# The package is this folder, so it has no version to pin.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[app,eval]"

WORKDIR /work
ENTRYPOINT ["atelier"]
CMD ["--help"]
