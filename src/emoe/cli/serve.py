"""`emoe serve`: OpenAI's API over a model, batched, with latency targets."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emoe import nano
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.cli.early import refuse_early, refuse_settings
from emoe.cli.layers import Layers
from emoe.cli.options import add_command
from emoe.cli.output import lossy_experts, note, print_json, table
from emoe.cli.plan import dense_text, stored_as
from emoe.cli.serve_options import add_options, in_seconds
from emoe.config import format_bytes
from emoe.engine.interface import EngineSettings, TaskTargets
from emoe.engine.refusals import generation_settings, refuse_attention, refuse_generation
from emoe.errors import UsageError
from emoe.planner import facts_of
from emoe.planner.limits import find_limits
from emoe.planner.remote import is_hub_id
from emoe.server.planning import ServingPlan, plan_serving

NEEDS = ("fastapi", "uvicorn", "prometheus_client", "psutil")
"""psutil is what transformers asks for the memory there is; without it, it complains in the log."""
_ENGINE = EngineSettings()
_EPILOG = (
    "Every option can also stand in the environment (--max-queue: EMOE_MAX_QUEUE) and in a TOML file (--config FILE: "
    "max-queue = 64); flags go before the environment, and that before the file. The first SIGINT or SIGTERM lets what "
    "runs finish, the second ends at once."
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "serve", run, "Serve a model behind OpenAI's API: batched, streamed, bounded.", epilog=_EPILOG
    )
    layers = Layers(parser)
    add_options(layers)
    parser.set_defaults(layers=layers)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop: exit code 0 then. Exit code 5 when it does not fit."""
    args = args.layers.resolve(args, os.environ)
    if args.json and not args.dry_run:
        raise UsageError("--json is for --dry-run")
    _default_profile(args)
    refuse_settings(args)
    refuse_early(args.model, args.expert_memory, args.expert_dtype)
    planned = _plan(args)
    settings = engine_settings(args, planned)
    if args.dry_run:
        if args.json:
            print_json(planned.as_dict())
        else:
            print(plan_text(planned, _name(args)))
        planned.check()
        return 0
    if args.trace is not None:
        raise UsageError("--trace records prompts that run alone; record with `emoe generate` or `emoe profile`")
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise UsageError(f"emoe serve needs {', '.join(missing)}: pip install 'emoe[serve]'")
    planned.check()
    _serve(args, planned, settings)
    return 0


def _default_profile(args: argparse.Namespace) -> None:
    """The embedded model's own profile: it says how long answers are, and what their tasks are."""
    if args.model is None and args.profile is None and nano.profile_path().is_dir():
        args.profile = str(nano.profile_path())


def _plan(args: argparse.Namespace) -> ServingPlan:
    dtype = None if args.dtype == "auto" else args.dtype
    name, facts = facts_of(args.model, dtype=dtype, expert_dtype=args.expert_dtype, revision=args.revision)
    refuse_attention(name, facts)
    refuse_generation(generation_settings(args.model, facts, args.revision).get)
    limits = find_limits(args.device, args.memory, args.process_memory)
    return plan_serving(
        facts,
        model=name,
        memory_bytes=limits.memory_bytes,
        memory_source=limits.memory_source,
        device=limits.device,
        process_limit_bytes=limits.process_bytes,
        process_source=limits.process_source,
        host_memory=args.host_memory,
        expert_memory=args.expert_memory,
        embeddings=args.embeddings,
        context=args.max_model_len,
        kv_memory_bytes=args.kv_memory,
        max_running=args.max_num_seqs,
        max_batch_tokens=args.max_num_batched_tokens,
        page_tokens=_ENGINE.page_tokens,
    )


def plan_text(planned: ServingPlan, name: str) -> str:
    """The plan for people."""
    plan = planned.memory
    rows = [
        ("dense weights", format_bytes(plan.dense_bytes), dense_text(plan)),
        (
            "experts, resident",
            format_bytes(plan.resident_bytes),
            f"{plan.resident_experts} of {plan.experts} ({plan.resident_share:.0%}), all are "
            f"{format_bytes(plan.expert_bytes)}{stored_as(plan)}",
        ),
        (
            "KV memory",
            format_bytes(planned.kv_bytes),
            f"{planned.kv_tokens} tokens of {format_bytes(planned.kv_token_bytes)}; a context is {planned.context}",
        ),
        (
            "activations",
            format_bytes(plan.activation_bytes),
            f"at most, {planned.max_batch_tokens} tokens of {planned.max_running} requests in a step",
        ),
    ]
    whole = _of(plan.memory_bytes, plan.memory_source)
    process = [
        ("read buffers", format_bytes(plan.buffer_bytes), "experts on their way into memory"),
        ("Python and torch", format_bytes(plan.import_bytes + plan.runtime_bytes), "libraries, threads, kernels"),
    ]
    if plan.on_device:
        limit = _of(plan.process_limit_bytes, plan.process_source)
        rows += [
            ("CUDA", format_bytes(plan.device_runtime_bytes), "its context and kernels, assumed"),
            (f"{plan.device}, in all", format_bytes(plan.total_bytes), whole),
            *process,
            ("experts, on the host", format_bytes(plan.host_bytes), f"{plan.host_experts} of {plan.experts}, pinned"),
            ("the process, in all", format_bytes(plan.process_bytes), limit),
        ]
    else:
        rows += [*process, ("in all", format_bytes(plan.total_bytes), whole)]
    lines = [f"emoe serve {name} ({plan.model_type}, {plan.dtype})", table(rows, right=(1,))]
    if plan.lossy:
        lines.append(f"LOSSY: {lossy_experts(plan.expert_dtype)}")
    return "\n".join([*lines, *(f"note: {text}" for text in plan.assumed)])


def _of(memory_bytes: int | None, source: str) -> str:
    return "" if memory_bytes is None else f"of {format_bytes(memory_bytes)} {source}"


def _name(args: argparse.Namespace) -> str:
    """What clients call the model: the hub id, or the folder's name."""
    if args.served_model_name is not None:
        return str(args.served_model_name)
    if args.model is None:
        return "emoe-nano"
    return args.model if is_hub_id(args.model) else Path(args.model).resolve().name


def engine_settings(args: argparse.Namespace, planned: ServingPlan) -> EngineSettings:
    """The engine's side of the options."""
    targets: dict[str | None, TaskTargets] = dict(args.task_slo or [])
    if args.slo_ttft_ms is not None or args.slo_tpot_ms is not None:
        targets[None] = TaskTargets(ttft_slo_s=in_seconds(args.slo_ttft_ms), tpot_slo_s=in_seconds(args.slo_tpot_ms))
    return EngineSettings(
        scheduler=args.scheduler,
        max_running=args.max_num_seqs,
        max_batch_tokens=args.max_num_batched_tokens,
        kv_tokens=planned.kv_tokens,
        max_waiting=args.max_queue,
        context=planned.context,
        max_input_tokens=args.max_input_tokens,
        targets=targets,
    )


def _serve(args: argparse.Namespace, planned: ServingPlan, behind: EngineSettings) -> None:
    """Bind, load, start, serve, stop."""
    from emoe.server.running import address_of, listen

    with listen(args.host, args.port) as bound:
        from emoe.cli.session import open_session, warn_if_lossy
        from emoe.engine.engine import Engine
        from emoe.engine.moved import check
        from emoe.server.app import create_app
        from emoe.server.running import serve

        check()
        task = args.task  # of requests that name none; loading has nothing to label with it
        args.task = None
        options = {
            "expert_memory": planned.expert_memory,
            "embeddings": planned.memory.embeddings,
            "max_read_bytes_per_s": args.max_read_bytes_per_s,
        }
        with _log_as_notes(), open_session(args, **options) as session:
            settings = server_settings(args, session.model.generation_config, task)
            engine = Engine(session.model, session.tokenizer, behind)
            if task is not None:
                engine.labels(task)  # before clients choose theirs
            app = create_app(engine, settings, session.tokenizer, _name(args))
            engine.start()
            try:
                stats = session.stats
                warn_if_lossy(stats)
                bound.listen()  # whoever reads this line may connect at once
                note(
                    f"serving {_name(args)} at {address_of(bound)}/v1: mode {engine.mode}"
                    f"{'' if engine.expert_dtype == NATIVE else f', {engine.expert_dtype} experts'}"
                    f"{' (LOSSY)' if engine.lossy else ''}, {format_bytes(stats['budget_bytes'])} for experts of "
                    f"{format_bytes(stats['total_expert_bytes'])}, KV {format_bytes(planned.kv_bytes)} for "
                    f"{planned.kv_tokens} tokens, scheduler {engine.scheduler_name}"
                )
                serve(app, bound)
            finally:
                engine.stop()
    note("stopped")


def server_settings(args: argparse.Namespace, generation: Any, task: str | None) -> Any:
    """The HTTP side of the options. What requests leave out comes from the model's generation configuration."""
    from emoe.server.settings import MAX_CONNECTIONS, ServerSettings

    greedy = generation.do_sample is False
    return ServerSettings(
        api_key=args.api_key,
        cors_origins=tuple(args.cors_origin or ()),
        max_connections=args.max_connections or max(MAX_CONNECTIONS, 2 * (args.max_queue + args.max_num_seqs)),
        max_body_bytes=args.max_body_size,
        request_timeout_s=args.request_timeout or None,
        keep_alive_s=args.keep_alive,
        write_timeout_s=args.write_timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        status_interval_s=args.status_interval,
        default_task=task,
        temperature=0.0 if greedy else _or(generation.temperature, 1.0),
        top_p=1.0 if greedy else _or(generation.top_p, 1.0),
        top_k=None if greedy else generation.top_k or None,
        max_tokens=generation.max_new_tokens,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


class _Notes(logging.Handler):
    """Log records as the commands' notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        note(self.format(record))


@contextmanager
def _log_as_notes() -> Iterator[None]:
    handler = _Notes()
    # uvicorn warns of what is no HTTP (which is counted) without saying whose, and of each client that offers HTTP/2.
    levels = {logging.getLogger("emoe"): logging.INFO, logging.getLogger("uvicorn"): logging.ERROR}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.removeHandler(handler)
            logger.setLevel(level)
