# sdruntime serve on a Jetson Orin with JetPack 6.2 (Ubuntu 22.04, Python 3.10, TensorRT 10.3). Build it on the board.
#   docker build -f deploy/jetson.Dockerfile -t sdruntime:jetson .
# The base has TensorRT and its Python module, of the version that JetPack installs: engines built outside the container run in it.
FROM nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel
# Ubuntu's own packages, so their versions are those of the base
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY runtime /src/runtime
# The environment must see the system's TensorRT. NumPy 1.26, because Ubuntu's Python packages may not support NumPy 2.
# The last line fails the build if the base has no TensorRT for Python. It does not import it: that needs the board's driver.
RUN python3 -m venv --system-site-packages /opt/sdruntime \
 && /opt/sdruntime/bin/pip install --no-cache-dir "numpy==1.26.*" "/src/runtime[server,images]" \
 && rm -r /src \
 && /opt/sdruntime/bin/python -c "from importlib.util import find_spec; assert find_spec('tensorrt'), 'no TensorRT for Python'"
# /tmp is the only folder that is written to: mount a tmpfs there when the root file system is read-only
ENV PATH=/opt/sdruntime/bin:$PATH HOME=/tmp SDRUNTIME_CACHE=/tmp/sdruntime PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
ENTRYPOINT ["sdruntime"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "7860", "--token", "/run/secrets/token", "--drain", "30", "--log", "json"]
