"""Shared parts of the commands: --json and --quiet, progress, and errors as messages, documents and exit codes."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

import click

from sdexport.cli.progress import progress_on
from sdexport.errors import SdexportError
from sdruntime.bundle.model import PredictionType
from sdruntime.cli.terminal import Failed, code_of, document, failure, reason_of, standard_output, wants_json
from sdruntime.errors import SdruntimeError

FAULTS = (SdexportError, SdruntimeError, MemoryError, OSError)


class Commands(click.Group):
    """A group that reports errors of its commands as a message, an exit code and, with --json, a document."""

    as_json = False

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        self.as_json = wants_json(arguments)
        with standard_output():
            try:
                code = super().main(arguments, prog_name, **extra | {"standalone_mode": False})
                sys.stdout.flush()
            except click.ClickException as error:
                error.show()
                if self.as_json:
                    name = "UsageError" if isinstance(error, click.UsageError) else type(error).__name__
                    with contextlib.suppress(OSError):
                        document(error=name, code=error.exit_code, reason=error.format_message())
                sys.exit(error.exit_code)
            except click.Abort:
                self.fail(KeyboardInterrupt())
            except OSError as error:  # of --help and --version
                self.fail(error)
            sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            sys.exit(128 + signal.SIGPIPE)
        except Failed as failed:
            self.fail(failed.error, **failed.fields)
        except (KeyboardInterrupt, *FAULTS) as error:
            self.fail(error)

    def fail(self, error: BaseException, **fields: Any) -> NoReturn:
        reason = reason_of(error)
        click.echo(reason if isinstance(error, KeyboardInterrupt) else f"error: {reason}", err=True)
        if self.as_json:
            with contextlib.suppress(OSError):  # the error may be of standard output itself
                document(**fields, **failure(error))
                sys.stdout.flush()
        sys.exit(code_of(error))


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --quiet and --json, which are accepted before and after the command's name."""
    quiet = click.option("-q", "--quiet", is_flag=True, callback=_also_before, help="Hide progress.")
    text = "Print one JSON document on standard output, even on failure."
    return click.option("--json", "as_json", is_flag=True, callback=_also_before, help=text)(quiet(command))


def overriding(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that replace parts of a checkpoint: those of sdexport.checkpoint.overrides."""
    predictions = click.Choice([*get_args(PredictionType)])
    texts = {
        "--vae": "Use this VAE: a folder or file of a VAE or of a checkpoint, or a Hugging Face model id.",
        "--preview-vae": "Add the decoder of this tiny VAE for previews: a folder, or a Hugging Face model id.",
        "--config": "Use the configs, tokenizers and scheduler of this diffusers folder, as far as it has them.",
    }
    for name, text in texts.items():
        command = click.option(name, metavar="DIR" if name == "--config" else "MODEL", help=text)(command)
    net = "Add this ControlNet, a folder, file or Hugging Face model id; NAME=MODEL gives each of several a name; may be repeated"
    command = click.option("--controlnet", "controlnets", multiple=True, metavar="[NAME=]MODEL", help=net)(command)
    net = "Add this T2I-Adapter, a folder or Hugging Face model id; NAME=MODEL as with --controlnet; may be repeated"
    command = click.option("--t2i-adapter", "t2i_adapters", multiple=True, metavar="[NAME=]MODEL", help=net)(command)
    lora = "Merge this LoRA, .safetensors, at a strength (1), another one in the text encoders, lbw: by block. May be repeated."
    command = click.option("--lora", "loras", multiple=True, metavar="FILE[:SCALE[:TEXT_SCALE]][:lbw=…]", help=lora)(command)
    adapter = "Add this IP-Adapter, .safetensors, for image prompts."
    command = click.option("--ip-adapter", metavar="FILE", help=adapter)(command)
    encoder = "The image encoder of the IP-Adapter, a folder with config.json (image_encoder beside FILE)."
    command = click.option("--image-encoder", metavar="DIR", help=encoder)(command)
    return click.option("--prediction-type", type=predictions, help="What the UNet predicts, if not as inferred.")(command)


def _also_before(context: click.Context, option: click.Parameter, value: bool) -> bool:
    return value or bool(option.name and context.find_root().params.get(option.name))


def with_progress(command: Callable[..., None]) -> Callable[..., None]:
    """Pass the command a `reporter` for its progress instead of `quiet`."""

    @functools.wraps(command)
    def wrapper(*, quiet: bool, **options: Any) -> None:
        with progress_on(quiet=quiet or options["as_json"]) as reporter:
            command(reporter=reporter, **options)

    return wrapper
