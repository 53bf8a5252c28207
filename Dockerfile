# qkpatch on CPUs; docs/ci.md says how it is built and used.
FROM python:3.12-slim AS build
# An index with a CPU build of torch; without it pip takes the default build, with CUDA's packages.
ARG TORCH_INDEX_URL=""
WORKDIR /src
RUN python -m venv /opt/qkpatch
COPY constraints.txt ./
RUN /opt/qkpatch/bin/pip install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY qkpatch qkpatch
RUN /opt/qkpatch/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 qkpatch \
    && install --directory --mode 1777 /cache /work
COPY --from=build /opt/qkpatch /opt/qkpatch
ENV PATH="/opt/qkpatch/bin:$PATH" HF_HOME="/cache/huggingface"
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["qkpatch"]
CMD ["--help"]
