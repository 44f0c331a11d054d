# The image of docs/cluster.md: docker build -t REGISTRY/ssr_rec:TAG . && docker push REGISTRY/ssr_rec:TAG
# torch's wheels bring CUDA; the base brings what lets a container see the GPUs of its host.
FROM nvidia/cuda:12.8.1-base-ubuntu22.04

# Ubuntu 22.04 has only a release candidate of Python 3.11. A compiler is for torch.compile and for our CPU operators.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends software-properties-common \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates curl g++ python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*

# AWS only: libfabric and the plugin by which NCCL uses EFA, such as --build-arg EFA_INSTALLER=1.43.2
# (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-changelog.html).
ARG EFA_INSTALLER=""
RUN if [ -n "$EFA_INSTALLER" ]; then \
        apt-get update && cd /opt \
        && curl -fsSL "https://efa-installer.amazonaws.com/aws-efa-installer-$EFA_INSTALLER.tar.gz" | tar xz \
        && cd aws-efa-installer && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify \
        && rm -rf /opt/aws-efa-installer /var/lib/apt/lists/*; \
    fi

WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# Before the code, so that a change of the code does not fetch 5 GB again.
COPY requirements requirements
RUN python3.11 -m venv /opt/venv \
    && pip install --no-cache-dir -r requirements/cuda.txt \
    && pip install --no-cache-dir --no-deps -r requirements/no-deps.txt

COPY . .
# A host with other vector instructions than the builder's builds the CPU operators again, at first use.
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python -c 'from ssr_rec.common.versions import check_stack; check_stack()' \
    && python -c 'from ssr_rec.kernels.extension import load; assert load()'
