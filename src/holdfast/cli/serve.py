"""`holdfast serve FOLDER`: an OpenAI-compatible endpoint for a checkpoint, an adapter or a CRAM folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.choices import BackendName, DtypeName, MixedName


def command(
    folder: Annotated[str, typer.Argument(help="Checkpoint, PEFT adapter or CRAM folder.")],
    backend: Annotated[BackendName, typer.Option(help="transformers for a small team, vllm for many users.")] = (
        "transformers"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    base: Annotated[str | None, typer.Option(help="Base model; by default the one that the folder names.")] = None,
    served_name: Annotated[str | None, typer.Option(help="What clients call it; by default the folder's name.")] = None,
    router: Annotated[
        Path | None, typer.Option(help="vllm: folder of `holdfast export-router`, so that the base is not loaded here.")
    ] = None,
    mixed: Annotated[
        MixedName,
        typer.Option(help="vllm: a request that several experts share goes to the first, to a merge, or nowhere."),
    ] = "first",
    vllm_url: Annotated[str | None, typer.Option(help="vllm: a running server, instead of starting one.")] = None,
    vllm_python: Annotated[str | None, typer.Option(help="vllm: the Python that has it, where it is another.")] = None,
    vllm_args: Annotated[str, typer.Option(help="vllm: more of its own options, as one text.")] = "",
    eager: Annotated[bool, typer.Option("--eager", help="vllm: no compiled graphs (short start, CPUs).")] = False,
    max_model_len: Annotated[int | None, typer.Option(help="vllm: tokens of prompt and answer together.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="vllm: share of the GPU's memory, such as 0.9.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="vllm: GPUs that share the model.")] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="vllm: room for adapters; by default what they need.")
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="float32, bfloat16, float16; by default as stored.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="transformers: requests that answer together.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    max_images: Annotated[int, typer.Option(min=0, help="Most pictures of a request.")] = 8,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of a picture.")] = 36_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 32_000_000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in line; more are told to come back (429).")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds from a request's arrival to its last token.")] = 120.0,
    allow_files: Annotated[
        Path | None, typer.Option(help="Clients may name pictures below this folder (file://); by default none.")
    ] = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="After the start, ask a probe and end if the folder is not what answers.")
    ] = False,
) -> None:
    """Serve a folder to OpenAI's clients: chat completions with pictures, streaming, /v1/models, /health.

    Each request to a CRAM folder is answered by its expert, or by the base alone where none claims it or the guard says
    that the base would refuse; `holdfast` in the reply says who and why. SIGTERM answers what has come, then ends.
    """
    import shlex

    from holdfast.errors import ConfigError, ModelError
    from holdfast.evaluation.vllm_options import VllmOptions
    from holdfast.serving.engine import Engine
    from holdfast.serving.protocol import Limits
    from holdfast.serving.run import announce, serve, served_checkpoint, with_files

    limits = with_files(
        Limits(
            body_bytes=max_body,
            images=max_images,
            image_pixels=max_image_pixels,
            max_tokens=max_tokens,
            waiting=max_waiting,
            timeout_s=timeout,
        ),
        allow_files,
    )
    options = VllmOptions(
        eager=True if eager else None,
        max_model_len=max_model_len,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
        max_lora_rank=max_lora_rank,
    )
    spoken = {"router": router, "vllm_url": vllm_url, "vllm_python": vllm_python, "vllm_args": vllm_args or None}
    spoken |= options.to_json()
    if backend != "vllm" and (named := [name for name, value in spoken.items() if value is not None]):
        raise ConfigError(f"--{named[0].replace('_', '-')} only speaks to vLLM; add --backend vllm, or leave it out.")
    if mixed != "first" and backend != "vllm":
        raise ConfigError("--mixed only speaks to vLLM: transformers mixes the experts exactly. Leave it out.")
    here = {"vllm_python": vllm_python, "vllm_args": vllm_args or None, "dtype": dtype} | options.to_json()
    if vllm_url is not None and (named := [name for name, value in here.items() if value is not None]):
        raise ConfigError(
            f"--{named[0].replace('_', '-')} is for a vLLM that is started here; give it to the server at {vllm_url}, "
            "or leave --vllm-url out."
        )
    try:
        arguments = shlex.split(vllm_args)
    except ValueError as error:
        raise ConfigError(f"--vllm-args {vllm_args!r} cannot be read: {error}.") from None
    checkpoint = served_checkpoint(folder, base=base)
    name = served_name or Path(folder).resolve().name
    made: list[Engine] = []

    def engine() -> Engine:
        if backend == "vllm":
            from holdfast.serving.remote import RemoteEngine

            made.append(
                RemoteEngine(
                    checkpoint,
                    name=name,
                    limits=limits,
                    url=vllm_url,
                    python=vllm_python,
                    router=router,
                    mixed=mixed,
                    options=options,
                    arguments=arguments,
                    dtype=dtype,
                )
            )
        else:
            from holdfast.serving.local import LocalEngine

            made.append(LocalEngine(checkpoint, name=name, limits=limits, batch_size=batch_size, dtype=dtype))
        return made[0]

    def probe(address: str) -> None:
        from holdfast.serving.check import check_served

        found = check_served(address, folder, base=base, model=name)
        typer.echo(found.sentence(address, folder), err=True)
        if found.verdict in ("base", "other"):
            raise ModelError(f"The canary says: {found.sentence(address, folder)}")

    serve(
        engine,
        host=host,
        port=port,
        limits=limits,
        ready=lambda address: typer.echo(announce(address, made[0].models)),
        after_start=probe if canary else None,
    )
