# SPDX-License-Identifier: Apache-2.0
# Maps and training in a container, from packages alone: the build asks no network for anything but the base image.
#
#   pip wheel . --no-deps -w dist && pip download -d dist "$(ls dist/drseg-*.whl)[all]"
#   docker build -t drseg .
#   docker run --rm -v "$PWD:/data" -w /data drseg predict run scene.tif --out map.tif
FROM python:3.11-slim

# Triton compiles with it at first use on a GPU; a CPU needs none of it
ARG COMPILER=""
RUN test -z "$COMPILER" || { apt-get update && apt-get install -y --no-install-recommends "$COMPILER" \
    && rm -rf /var/lib/apt/lists/*; }

RUN --mount=type=bind,source=dist,target=/dist pip install --no-cache-dir --no-index --find-links /dist 'drseg[all]'

RUN useradd --create-home drseg
USER drseg
ENTRYPOINT ["drseg"]
CMD ["doctor"]
