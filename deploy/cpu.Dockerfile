# sdruntime serve on a CPU, for amd64 and arm64.
#   docker build -f deploy/cpu.Dockerfile -t sdruntime:cpu .
# The build stage has pip and the sources; the image that runs has only the environment.
FROM python:3.12-slim-bookworm AS build
# the libraries that run the engines, as extras of runtime/pyproject.toml: onnxruntime, openvino or onnxruntime,openvino
ARG EXTRAS=onnxruntime
COPY constraints.txt /src/
COPY runtime /src/runtime
RUN python -m venv /opt/sdruntime \
 && /opt/sdruntime/bin/pip install --no-cache-dir --constraint /src/constraints.txt "/src/runtime[server,images,${EXTRAS}]"

FROM python:3.12-slim-bookworm
COPY --from=build /opt/sdruntime /opt/sdruntime
# /tmp is the only folder that is written to: mount a tmpfs there when the root file system is read-only
ENV PATH=/opt/sdruntime/bin:$PATH HOME=/tmp SDRUNTIME_CACHE=/tmp/sdruntime PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/readyz', timeout=4)"]
ENTRYPOINT ["sdruntime"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "7860", "--token", "/run/secrets/token", "--drain", "30", "--log", "json"]
