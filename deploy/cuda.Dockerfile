# sdruntime serve with TensorRT on an NVIDIA GPU, for amd64.
#   docker build -f deploy/cuda.Dockerfile -t sdruntime:cuda .
# No CUDA base image: TensorRT's wheels bring the CUDA libraries that they need, and the NVIDIA Container Toolkit mounts the driver.
FROM python:3.12-slim-bookworm AS build
# An engine runs only with the version of TensorRT that built it. CUDA 13 needs a driver of the series 580 or later;
# for older ones: --build-arg TENSORRT=tensorrt-cu12==10.16.1.11
ARG TENSORRT=tensorrt-cu13==11.4.0.106
COPY constraints.txt /src/
COPY runtime /src/runtime
RUN python -m venv /opt/sdruntime \
 && /opt/sdruntime/bin/pip install --no-cache-dir --constraint /src/constraints.txt "/src/runtime[server,images]" "${TENSORRT}"

FROM python:3.12-slim-bookworm
COPY --from=build /opt/sdruntime /opt/sdruntime
# what the NVIDIA Container Toolkit mounts: libcuda and nvidia-smi
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# /tmp is the only folder that is written to: mount a tmpfs there when the root file system is read-only
ENV PATH=/opt/sdruntime/bin:$PATH HOME=/tmp SDRUNTIME_CACHE=/tmp/sdruntime PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
ENTRYPOINT ["sdruntime"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "7860", "--token", "/run/secrets/token", "--drain", "30", "--log", "json"]
