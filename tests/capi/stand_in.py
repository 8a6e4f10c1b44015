#!/usr/bin/env python3
"""A worker that speaks the messages of sdruntime.serving.service without engines, for tests of the C library alone.

It is started in place of the interpreter; its last argument is the descriptor. Jobs take turns, one step at a time. Some prompts
cause faults: "kill", "segv", "exit", "nonsense", "huge" (a header that announces too much), "short" (an image of the wrong size),
"unsealed" (a memory file that may still shrink), "inline" (a large image without a memory file).
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct
import sys
import zlib
from pathlib import Path

HEADER = struct.Struct("<IIQ")
SHARED = 1
CHANNELS, FACTOR, SIDE = 4, 8, 64
LARGEST_MESSAGE = 1 << 20  # bytes; at a larger message the worker exits without reading it


class Link:
    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.socket.recv(size)
            if not part:
                sys.exit(0)
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> tuple[dict, bytes]:
        files = array.array("i")
        first, control, _, _ = self.socket.recvmsg(HEADER.size, socket.CMSG_SPACE(4))
        for _, kind, data in control:
            if kind == socket.SCM_RIGHTS:
                files.frombytes(data[:4])
        if not first:
            sys.exit(0)
        size, flags, blob = HEADER.unpack(first + self.read(HEADER.size - len(first)))
        if size > LARGEST_MESSAGE:
            os._exit(8)
        message = json.loads(self.read(size))
        if not flags & SHARED:
            return message, self.read(blob)
        with os.fdopen(files[0], "rb") as file:
            return message, file.read()

    def send(self, message: dict, blob: bytes = b"", *, seal: bool = True, inline: bool = False) -> None:
        body = json.dumps(message).encode()
        if inline or len(blob) < 1 << 16:
            self.socket.sendall(HEADER.pack(len(body), 0, len(blob)) + body + blob)
            return
        file = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(file, blob)
        if seal:
            import fcntl

            fcntl.fcntl(file, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        self.socket.sendmsg([HEADER.pack(len(body), SHARED, len(blob))], rights)
        self.socket.sendall(body)
        os.close(file)


class Job:
    def __init__(self, message: dict, blob: bytes) -> None:
        self.id, self.request, self.message, self.image = message["job"], message["request"], message, blob
        self.step, self.cancelled = 0, False
        self.width, self.height = self.request.get("width", SIDE), self.request.get("height", SIDE)

    def rows(self) -> bytes:
        """Return rows that depend on the whole request and the start image."""
        mark = zlib.crc32(json.dumps(self.request, sort_keys=True).encode() + self.image)
        line = bytes((mark >> 8 * (k % 4) ^ k) & 255 for k in range(3 * self.width))
        return line * self.height


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + rows[k * 3 * width : (k + 1) * 3 * width] for k in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 1)) + chunk(b"IEND", b"")


def fault(job: Job) -> tuple[int, str] | None:
    """Return the code and message for an invalid request."""
    request = job.request
    if request["steps"] < 1:
        return 2, f"steps {request['steps']}: at least 1"
    if request.get("sampler", "ddim") not in ("ddim", "euler"):
        return 2, f"unknown sampler {request['sampler']!r}"
    if job.width % FACTOR or job.height % FACTOR:
        return 5, f"size {job.width}x{job.height} is not a multiple of {FACTOR}"
    return None


def cause_fault(link: Link, prompt: str) -> None:
    """Cause the fault that the prompt names, if any."""
    if prompt == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif prompt == "segv":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif prompt == "exit":
        os._exit(7)
    elif prompt == "nonsense":
        link.socket.sendall(HEADER.pack(5, 0, 0) + b"{]}x\xff")
    elif prompt == "huge":
        link.socket.sendall(HEADER.pack(10, 0, 1 << 60))


def advance(link: Link, job: Job) -> bool:
    """Run one step. Returns false at the end of the job."""
    if job.cancelled:
        link.send({"event": "failed", "job": job.id, "code": 130, "message": "cancelled"})
        return False
    if job.step == 0:
        link.send({"event": "started", "job": job.id})
    if job.step == job.request["steps"]:
        prompt, rows = job.request["prompt"], job.rows()
        png_bytes = png(job.width, job.height, rows) if job.message["png"] else b""
        event = {"event": "done", "job": job.id, "width": job.width, "height": job.height, "seed": job.request["seed"]}
        event |= {"sampler": job.request.get("sampler", "ddim"), "warnings": [], "rgb": len(rows), "png": len(png_bytes)}
        event["timings"] = {"queued": 0.0, "encode": 0.25, "denoise": 0.5, "decode": 0.125, "total": 1.0}
        blob = rows + png_bytes
        link.send(event, blob[:-1] if prompt == "short" else blob, seal=prompt != "unsealed", inline=prompt == "inline")
        return False
    job.step += 1
    if job.step == 2:
        cause_fault(link, job.request["prompt"])
    event = {"event": "progress", "job": job.id, "step": job.step, "steps": job.request["steps"]}
    blob = b""
    if job.message["preview"]:
        event["preview"] = [CHANNELS, job.height // FACTOR, job.width // FACTOR]
        blob = struct.pack("<f", job.step) * (CHANNELS * (job.height // FACTOR) * (job.width // FACTOR))
    link.send(event, blob)
    return True


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def open_bundle(link: Link, message: dict) -> None:
    """Answer an "open" message."""
    if not (Path(message["bundle"]) / "manifest.json").exists():
        link.send({"event": "refused", "code": 5, "message": f"{message['bundle']}: no manifest.json"})
        sys.exit(0)
    link.send({"event": "log", "level": "info", "message": f"opened {message['bundle']} as process {os.getpid()}"})
    describe = {
        "model": "stand-in",
        "components": {},
        "sizes": [SIDE, SIDE],
        "samplers": ["ddim", "euler"],
        "process": os.getpid(),
        "descriptors": [number for number in range(256) if is_open(number)],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "children": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    }
    link.send({"event": "ready", "describe": describe | {"options": message["options"]}})


def main() -> None:
    link, jobs = Link(int(sys.argv[-1])), {}
    while True:
        while select.select([link.socket], [], [], 0 if jobs else None)[0]:
            message, blob = link.receive()
            if message["op"] == "open":
                open_bundle(link, message)
            elif message["op"] == "submit":
                job = Job(message, blob)
                if error := fault(job):
                    link.send({"event": "failed", "job": job.id, "code": error[0], "message": error[1]})
                else:
                    jobs[job.id] = job
            elif message["op"] == "cancel":
                if message["job"] in jobs:
                    jobs[message["job"]].cancelled = True
            elif message["op"] == "close":
                link.send({"event": "log", "level": "info", "message": "closing"})
                for job in jobs.values():
                    link.send({"event": "failed", "job": job.id, "code": 130, "message": "closed"})
                link.send({"event": "closed"})
                sys.exit(0)
        jobs = {key: job for key, job in jobs.items() if advance(link, job)}


if __name__ == "__main__":
    main()
