"""What SGLang is told, and what its log means. No SGLang is needed for these."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ghostvis_cli.engines.base import Sampling
from ghostvis_cli.errors import EngineError, ExitCode, MemoryLimitError, ModelError, UsageError
from ghostvis_cli.image_limits import ImageLimits
from ghostvis_cli.profile import EngineSettings, Profile
from ghostvis_cli.serve.listen import free_port
from ghostvis_cli.serve.settings import WORKERS, ServerSettings, SGLangSettings
from ghostvis_cli.sglang import runtime
from ghostvis_cli.sglang.child import Child, members
from ghostvis_cli.sglang.log import SGLangLog, is_notable
from ghostvis_cli.sglang.server import Launch, flags, with_sampling
from tests.engines.serving import eventually

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1280,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    default = Sampling()
    generation = {"temperature": default.temperature, "top_p": default.top_p, "top_k": default.top_k}
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "generation_config.json").write_text(json.dumps({"do_sample": True, **generation}))
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (place / "model.safetensors").write_bytes(b"weights")
    return place


SLEEPS = "sleep 1000 & echo $!; wait"


def install_sglang(place: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name and version, first on the path."""
    (place / "sglang").mkdir()
    (place / "sglang" / "__init__.py").touch()
    about = place / f"sglang-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    monkeypatch.syspath_prepend(place)


def on_cpu(**engine: object) -> Profile:
    return Profile(engine=EngineSettings(device="cpu", **engine))  # type: ignore[arg-type]


# --- what it is told


@pytest.mark.parametrize(
    ("windows", "engine", "context"),
    [
        ([512, 2048], {"device": "cuda"}, 2048),
        ([512, 2048], {"device": "cuda", "attention_backend": "fa3"}, None),
        ([512, 2048], {"device": "cuda", "context_length": 4096}, 4096),
        ([2048, 2048], {"device": "cuda"}, None),
        ([512, 2048], {"device": "cpu"}, None),
        ([], {"device": "cuda"}, None),
    ],
)
def test_a_model_with_windows_of_two_lengths_is_served_to_its_trained_length(
    directory: Path, windows: list[int], engine: dict[str, object], context: int | None
) -> None:
    """On a GPU, whose attention kernels mostly plan with one."""
    config = CONFIG | {"window_sizes": windows, "trained_positions": 2048, "max_position_embeddings": 20480}
    (directory / "config.json").write_text(json.dumps(config))
    profile = Profile(engine=EngineSettings(**engine))  # type: ignore[arg-type]
    assert runtime.arguments(profile, directory).get("context_length") == context


def test_a_profile_becomes_arguments(directory: Path) -> None:
    profile = on_cpu(
        tensor_parallel_size=2, data_parallel_size=3, context_length=512, attention_backend="fa3"
    )
    found = runtime.arguments(replace(profile, sampling=Sampling(seed=7)), directory, name="d4")
    wanted = {
        "model_path": str(directory),
        "served_model_name": "d4",
        "dtype": "float32",
        "device": "cpu",
        "tp_size": 2,
        "dp_size": 3,
        "context_length": 512,
        "schedule_policy": "lpm",
        "attention_backend": "fa3",
        "random_seed": 7,
        "enable_cache_report": True,
        "chat_template": str(directory / "chat_template.jinja"),
        "tokenizer_worker_num": 1,
    }
    assert wanted.items() <= found.items()


def test_what_a_profile_leaves_open_is_left_to_sglang(directory: Path) -> None:
    found = runtime.arguments(on_cpu(), directory)
    unset = ("served_model_name", "mem_fraction_static", "context_length", "attention_backend", "random_seed")
    assert not set(unset) & set(found)


def test_a_gpu_gets_bfloat16_and_its_number(directory: Path) -> None:
    profile = Profile(engine=EngineSettings(device="cuda:3", gpu_memory_utilization=0.5))
    found = runtime.arguments(profile, directory)
    assert (found["device"], found["base_gpu_id"], found["dtype"]) == ("cuda", 3, "bfloat16")
    assert found["mem_fraction_static"] == 0.5
    assert "max_total_tokens" not in found
    assert "SGLANG_USE_CPU_ENGINE" not in runtime.environment(profile)


@pytest.mark.parametrize(("layers", "tokens"), [(4, 4 * 1280), (40_000, 1281), (800, 10485)])
def test_a_cpu_keeps_a_bounded_cache_that_holds_one_whole_context(
    directory: Path, layers: int, tokens: int
) -> None:
    """2 GiB: 4 contexts of a small model, never less than one; 800 layers x 2 x 2 x 16 x 4 bytes in between."""
    context = 5000 if layers == 800 else 1280
    config = CONFIG | {"num_hidden_layers": layers, "max_position_embeddings": context}
    (directory / "config.json").write_text(json.dumps(config))
    assert runtime.arguments(on_cpu(), directory)["max_total_tokens"] == tokens


def test_ranks_on_a_cpu_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    assert runtime.share_cores([0, 1, 4, 5], 2) == "0,1|4,5"
    assert runtime.share_cores([3], 2) == "3|3"
    bound = runtime.environment(on_cpu(tensor_parallel_size=2))["SGLANG_CPU_OMP_THREADS_BIND"]
    assert bound.count("|") == 1
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in runtime.environment(on_cpu())


def on_gpu(**engine: object) -> Profile:
    return Profile(engine=EngineSettings(device="cuda:0", **engine))  # type: ignore[arg-type]


def launch(directory: Path, profile: Profile, *options: str, **server: object) -> Launch:
    settings = ServerSettings(**server)  # type: ignore[arg-type]
    return Launch(profile, directory, "d4", settings, SGLangSettings(options=options))


def test_a_gpu_gets_prefill_graphs_and_pieces_of_some_tokens_and_a_cpu_neither(directory: Path) -> None:
    names = ("cuda_graph_backend_prefill", "stream_interval")
    found = runtime.arguments(on_gpu(attention_backend="triton"), directory)
    assert [found[name] for name in names] == ["breakable", runtime.STREAM_INTERVAL]
    assert not set(names) & set(runtime.arguments(on_cpu(), directory))


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        ({"smear": True}, "disabled"),
        ({"smear": False}, "breakable"),
        (
            {"text_config": CONFIG | {"model_type": runtime.NANOCHAT, "smear": False}, "vision_config": {}},
            "disabled",
        ),
    ],
)
def test_nanochats_smear_and_images_get_no_graphs_of_prefill(
    directory: Path, config: dict[str, object], graphs: str
) -> None:
    whole = CONFIG | {"model_type": runtime.NANOCHAT} | config
    (directory / "config.json").write_text(json.dumps(whole))
    found = runtime.arguments(on_gpu(attention_backend="triton"), directory)
    assert found["cuda_graph_backend_prefill"] == graphs


@pytest.mark.parametrize("option", ["--disable-cuda-graph", "--disable-prefill-cuda-graph"])
def test_a_user_who_wants_no_graphs_gets_none_of_ours(directory: Path, option: str) -> None:
    ours = "--cuda-graph-backend-prefill"
    assert ours in launch(directory, on_gpu()).argv(directory, None)
    without = launch(directory, on_gpu(), option)
    assert ours not in without.argv(directory, None)
    whole = option == "--disable-cuda-graph"
    assert (without.environment().get("GHOSTVIS_VISION_GRAPHS") == "0") is whole


def test_one_thread_for_small_copies_on_a_gpu_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runtime.environment(on_gpu())["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in runtime.environment(on_cpu())
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "OMP_NUM_THREADS" not in runtime.environment(on_gpu())


@pytest.mark.parametrize("options", [("--tokenizer-worker-num", "3"), ("--tokenizer-worker-num=3",)])
def test_several_http_workers_load_the_plug_in_and_know_images_by_one_key(
    directory: Path, options: tuple[str, ...]
) -> None:
    one, several = launch(directory, on_cpu()), launch(directory, on_cpu(), *options)
    module = "ghostvis_cli.sglang.plugin.launch"
    assert module in several.argv(directory, None) and module not in one.argv(directory, None)
    found = several.environment()
    assert len(found["GHOSTVIS_PICTURE_KEY"]) == 64 and "GHOSTVIS_TOKENIZER_WORKERS" in found
    assert found["GHOSTVIS_PICTURE_KEY"] != several.environment()["GHOSTVIS_PICTURE_KEY"]
    assert "GHOSTVIS_PICTURE_KEY" not in one.environment()


def test_several_http_workers_check_the_key_that_sglang_would_refuse_to_check(directory: Path) -> None:
    one = launch(directory, on_cpu(), api_key="k")
    several = launch(directory, on_cpu(), "--tokenizer-worker-num", "2", host="0.0.0.0", api_key="k")
    assert one.told(one.secrets) == {"api-key": "k"}
    assert several.told(several.secrets).keys() == {"admin-api-key"}
    assert "api-key" in several.secrets  # for our own check
    without = launch(directory, on_cpu(), "--tokenizer-worker-num", "2")
    skips = ["--skip-server-warmup" in each.argv(directory, None) for each in (one, without, several)]
    assert skips == [False, False, True]  # SGLang's first requests would come without the key


def test_a_gpus_requests_come_in_at_a_process_for_every_four_cores(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(cores: int, *options: str) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        return launch(directory, on_gpu(), *options).workers

    assert [workers(cores) for cores in (2, 8, 16, 64)] == [1, 2, 4, 4]
    assert workers(16, "--tokenizer-worker-num", "6") == 6
    assert workers(16, "--nnodes=2") == 1
    assert launch(directory, on_cpu()).workers == 1


def test_arguments_become_flags() -> None:
    values: Any = {"tp_size": 2, "enable_metrics": True, "skip_server_warmup": False, "model_path": "a b"}
    assert flags(values) == ["--tp-size", "2", "--enable-metrics", "--model-path", "a b"]


def test_the_users_own_options_come_last_and_untouched(directory: Path) -> None:
    options = ("--schedule-policy", "fcfs", "--watch-out=a b")
    launch = Launch(on_cpu(), directory, "d4", ServerSettings(port=1234), SGLangSettings(options=options))
    argv = launch.argv(directory, None)
    assert argv[-3:] == list(options)
    assert argv[argv.index("--port") + 1] == "1234"


def test_a_file_in_the_current_directory_is_not_taken_for_sglang(directory: Path, tmp_path: Path) -> None:
    package, here = tmp_path / "installed" / "sglang", tmp_path / "here"
    for place in (package, here):
        place.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text("print('installed')")
    (here / "sglang.py").write_text("raise SystemExit('not SGLang')")
    done = subprocess.run(
        launch(directory, on_cpu()).argv(directory, None),
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "installed\n", done.stderr


@pytest.mark.parametrize("option", ["--host", "--port=1", "--api-key", "--model-path", "--config"])
def test_options_that_would_get_past_the_checks_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match="is decided by ghostvis serve"):
        SGLangSettings(options=("--log-level", "debug", option))


@pytest.mark.parametrize(
    ("option", "full"),
    [("--tokenizer-worker", WORKERS), ("--ho", "--host"), ("--conf=keys.yaml", "--config")],
)
def test_a_short_form_cannot_get_past_the_checks_either(option: str, full: str) -> None:
    with pytest.raises(UsageError, match=f"SGLang may take {option.partition('=')[0]} for {full}"):
        SGLangSettings(options=(option, "4"))


def test_the_short_form_of_another_option_is_sglangs_own_affair() -> None:
    assert SGLangSettings(options=("--chunked-prefill", "2048", "--tokenizer-mode", "auto")).options


def test_a_word_that_is_no_option_is_refused() -> None:
    with pytest.raises(UsageError, match="takes no argument 'model'"):
        SGLangSettings(options=("model",))


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ((), 0),
        (("--node-rank", "2"), 2),
        (("--nnodes=2", "--node-rank=1"), 1),
        (("--node-rank=1", "--node-rank", "+3"), 3),
        (("--node-rank", "3", "--node-rank=1"), 1),
    ],
)
def test_the_node_of_a_model_over_several_machines_is_known(options: tuple[str, ...], rank: int) -> None:
    assert SGLangSettings(options=options).node_rank == rank


def test_the_keys_stand_in_no_argument_and_no_variable(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTVIS_API_KEY", "s3cret")
    monkeypatch.setenv("MY_ADMIN_KEY", "adm1n")
    server = ServerSettings(host="127.0.0.1", api_key="s3cret")
    launch = Launch(on_cpu(), directory, "d4", server, SGLangSettings(), admin_key="adm1n")
    assert not {"s3cret", "adm1n"} & {*launch.argv(directory, None), *launch.environment().values()}
    assert launch.secrets == {"api-key": "s3cret", "admin-api-key": "adm1n"}
    assert "s3cret" not in repr(launch)
    assert "adm1n" not in repr(launch)


def test_the_ground_of_transparent_images_reaches_sglang(directory: Path) -> None:
    server = ServerSettings(image_limits=ImageLimits(background="#102030"))
    launch = Launch(on_cpu(), directory, "d4", server, SGLangSettings())
    assert launch.environment()["GHOSTVIS_IMAGES_BACKGROUND"] == "#102030"


def test_management_routes_have_a_key_of_their_own_beyond_this_machine(directory: Path) -> None:
    inside = Launch(on_cpu(), directory, "d4", ServerSettings(api_key="k"), SGLangSettings())
    outside = replace(inside, server=ServerSettings(host="0.0.0.0", api_key="k"))
    assert "admin-api-key" not in inside.secrets
    assert len(outside.secrets["admin-api-key"]) == 32


@pytest.mark.parametrize(
    "line",
    [
        "ghostvis: vision part has CUDA graphs of 1 to 16 images, 0.24 GiB, 1.7 s; attention without cuDNN",
        "Capture target prefill CUDA graph end. elapsed=8.29 s, mem usage=1.42 GB, avail mem=28.64 GB.",
        "Capture cuda graph begin. This can take up to several minutes.",
    ],
)
def test_what_runs_as_graphs_is_worth_showing(line: str) -> None:
    assert is_notable(f"[2026-11-28 07:09:04] {line}")


def test_sampling_as_the_model_has_it_needs_no_copy(directory: Path, tmp_path: Path) -> None:
    assert with_sampling(directory, Sampling(), tmp_path / "other") == directory


def test_other_sampling_defaults_reach_sglang_through_a_directory_of_links(
    directory: Path, tmp_path: Path
) -> None:
    place = with_sampling(directory, Sampling(temperature=0, top_k=0), tmp_path / "other")
    config = json.loads((place / "generation_config.json").read_text())
    assert (config["temperature"], config["top_k"], config["do_sample"]) == (0, -1, False)
    assert (place / "model.safetensors").readlink() == directory / "model.safetensors"
    assert json.loads((directory / "generation_config.json").read_text())["do_sample"] is True


@pytest.mark.parametrize(
    ("version", "device", "reason"),
    [
        ("0.6.0", "cpu", "SGLang 0.6.0 is installed, and 0.5.17 to 0.5.23 are supported"),
        ("0.5.16", "cpu", "SGLang 0.5.16 is installed, and 0.5.17 to 0.5.23 are supported"),
        ("0.5.17.post1", "cpu", None),
        ("0.5.23", "cpu", None),
        ("0.5.23", "mps", "SGLang does not run on mps"),
    ],
)
def test_only_the_versions_that_were_tried_are_used(
    version: str, device: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_sglang(tmp_path, version, monkeypatch)
    assert runtime.why_not(device=device, explicit=True) == reason


def test_a_cpu_is_used_only_where_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_sglang(tmp_path, "0.5.23", monkeypatch)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert runtime.why_not(device="cpu") == "the device is cpu"
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert runtime.why_not(device="cpu") is None


# --- what its log means


@pytest.mark.parametrize(
    ("lines", "kind", "words"),
    [
        (
            ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."],
            MemoryLimitError,
            "ran out of memory",
        ),
        (
            ["RuntimeError: Not enough memory. Please try to increase --mem-fraction-static."],
            MemoryLimitError,
            "no memory for keys and values",
        ),
        (
            [
                "[Errno 98] error while attempting to bind on address ('127.0.0.1', 80): address already in use"
            ],
            EngineError,
            "a port that SGLang needs was taken",
        ),
        (
            [
                "ValueError: http_port at 31777 is not available in 30 seconds. Port 31777 is in use by process 1."
            ],
            EngineError,
            "a port that SGLang needs was taken",
        ),
        (
            [
                "[2026] Failed to execute general plugin: ghostvis",
                "ImportError: cannot import name 'hf'",
                "ValueError: The checkpoint you are trying to load has model type `ghostvis` but Transformers "
                "does not recognize this architecture. pip install --upgrade transformers",
            ],
            EngineError,
            "could not import the ghostvis plug-in",
        ),
        (
            [
                "[2026] Ignore import error when loading ghostvis_cli.sglang.plugin.models.text: No module named x"
            ],
            EngineError,
            "No module named x",
        ),
        (
            ["ValueError: model type `ghostvis` but Transformers does not recognize this architecture."],
            EngineError,
            "started without the ghostvis plug-in",
        ),
        (
            ["ValueError: the directory lacks 3 of the model's tensors: lm_head.weight"],
            ModelError,
            "lacks 3 of the model's tensors",
        ),
        (
            ["usage: launch_server.py", "launch_server.py: error: unrecognized arguments: --nonsense"],
            UsageError,
            "unrecognized arguments: --nonsense",
        ),
    ],
)
def test_the_errors_users_meet_become_one_line(lines: list[str], kind: type[Exception], words: str) -> None:
    log = SGLangLog()
    for line in ["[2026-11-23 13:53:08] Load weight begin.", *lines, "[2026] kill_process_tree called"]:
        log.feed(line)
    error = log.failure(1)
    assert type(error) is kind
    assert words in error.message
    assert error.hint
    assert "\n" not in error.message


def test_any_other_end_is_told_with_the_last_error_of_the_log() -> None:
    log = SGLangLog()
    log.feed("Traceback (most recent call last):")
    log.feed("ZeroDivisionError: division by zero")
    log.feed("kill_process_tree called")
    error = log.failure(1)
    assert error.message == "SGLang ended with code 1: ZeroDivisionError: division by zero"
    assert error.code == ExitCode.ENGINE


DIED = "RuntimeError: Rank 0 scheduler died during initialization (exit code: -3). If exit code is -9 ..."
TRACEBACK = ["Traceback (most recent call last):", '  File "a.py", line 1, in b', "    c()"]


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (
            "torch.AcceleratorError: CUDA error: device kernel image is invalid",
            EngineError,
            "device kernel image is invalid",
        ),
        (
            "RuntimeError: CUDA error: no kernel image is available for execution",
            EngineError,
            "no code for this GPU",
        ),
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
            MemoryLimitError,
            "out of memory",
        ),
        ("RuntimeError: CUDA error: invalid device ordinal", EngineError, "invalid device ordinal"),
        (
            "torch.distributed.DistBackendError: NCCL error in: a.cpp:1, unhandled system error",
            EngineError,
            "NCCL",
        ),
        ("RuntimeError: Ninja is required to load C++ extensions", EngineError, "compile code for the GPU"),
        (
            "ValueError: Unknown quantization method: x.",
            EngineError,
            "ValueError: Unknown quantization method: x.",
        ),
        ("AssertionError", EngineError, "AssertionError"),
        ("zmq.error.ZMQError: Address already in use", EngineError, "a port that SGLang needs was taken"),
    ],
)
def test_the_first_cause_is_told_and_not_what_followed_from_it(
    cause: str, kind: type[Exception], words: str
) -> None:
    """A rank dies, another misses it, and the main process says that ranks have died."""
    log = SGLangLog()
    for line in (
        "ModuleNotFoundError: No module named 'an_optional_one'",
        "[2026-11-28 05:00:01 TP0] Scheduler hit an exception: Traceback (most recent call last):",
        *(*TRACEBACK[1:], cause, "CUDA kernel errors might be asynchronously reported at some other call."),
        "[2026-11-28 05:00:02 TP1] Scheduler hit an exception: Traceback (most recent call last):",
        *(*TRACEBACK[1:], "RuntimeError: [a.cc:1] Connection closed by peer [127.0.0.1]:1"),
        "torch.distributed.DistBackendError: NCCL error in: b.cpp:2, remote process exited",
        *(*TRACEBACK, "ValueError: something else that is gone now"),
        "[2026-11-28 05:00:03] Received sigquit from a child process.",
        *(*TRACEBACK, DIED),
    ):
        log.feed(line)
    error = log.failure(1)
    assert type(error) is kind
    assert words in error.message
    assert "died" not in error.message


def test_a_rank_that_was_killed_without_a_word_is_told_with_what_kills() -> None:
    log = SGLangLog()
    log.feed(
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9 ..."
    )
    assert "SIGKILL" in log.failure(1).message


def test_a_kill_is_told_with_what_kills() -> None:
    """Not with what the children say of the pipes that ended with it."""
    log = SGLangLog()
    log.feed("BrokenPipeError: [Errno 32] Broken pipe")
    error = log.failure(-signal.SIGKILL)
    assert "SIGKILL" in error.message
    assert error.code == ExitCode.ENGINE


def test_an_error_before_a_kill_is_the_reason() -> None:
    log = SGLangLog()
    log.feed("NotImplementedError: no kernel")
    log.feed("Exception: Capture cuda graph failed: no kernel")
    log.feed(
        "[2026-11-23 14:11:48] Received sigquit from a child process. It usually means the child failed."
    )
    assert (
        "by SIGKILL: Exception: Capture cuda graph failed: no kernel" in log.failure(-signal.SIGKILL).message
    )


def test_the_log_never_shows_a_key() -> None:
    assert SGLangLog(secrets=("s3cret",)).feed("server_args={'api_key': 's3cret'}\n") == (
        "server_args={'api_key': '***'}"
    )


def test_requests_are_notable_and_probes_and_batches_are_not() -> None:
    assert is_notable('INFO:     127.0.0.1:1 - "POST /v1/chat/completions HTTP/1.1" 200 OK')
    assert not is_notable('INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK')
    assert not is_notable("[2026] Decode batch, #running-req: 1, #token: 40")
    assert not is_notable("[2026] server_args={'watchdog_timeout': 300}")


# --- the child


async def test_the_child_and_all_below_it_end_together() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    child = await Child.start(["/bin/sh", "-c", SLEEPS], os.environ, lines.put_nowait)
    group = child.pid
    assert int(await lines.get()) in members(group)
    assert await child.end() == -signal.SIGKILL
    assert members(group) == []
    assert await child.end() == -signal.SIGKILL  # once is enough


def test_a_kill_of_ours_takes_the_child_and_all_below_it_along() -> None:
    """SIGKILL, so nothing of ours runs any more: the watcher does it."""
    code = (
        "import asyncio, os; from ghostvis_cli.sglang.child import Child\n"
        "async def main():\n"
        f"    child = await Child.start(['/bin/sh', '-c', {SLEEPS!r}], os.environ, lambda line: "
        "print(child.pid, line, flush=True))\n"
        "    await child.wait()\n"
        "asyncio.run(main())"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    group, below = map(int, ours.stdout.readline().split())
    assert {group, below} <= set(members(group))
    ours.kill()
    ours.wait()
    eventually(lambda: not members(group))
    ours.stdout.close()


# A process with what SGLang's leave: a socket among temporary files, a segment of shared memory.
LEAVES = 'exec 9>"/dev/shm/psm_ghostvis_$$"; touch "$TMPDIR/tmpsocket"; echo "$TMPDIR $$"; sleep 1000'


def left(line: str) -> list[Path]:
    folder, pid = line.split()
    return [place for place in (Path(folder), Path(f"/dev/shm/psm_ghostvis_{pid}")) if place.exists()]


async def test_a_child_takes_its_temporary_files_and_its_shared_memory_along() -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    child = await Child.start(["/bin/sh", "-c", LEAVES], os.environ, lines.put_nowait)
    line = await lines.get()
    assert len(left(line)) == 2
    await child.end()
    assert left(line) == []


def test_a_kill_of_ours_leaves_nothing_of_the_childs_files() -> None:
    code = (
        "import asyncio, os; from ghostvis_cli.sglang.child import Child\n"
        "async def main():\n"
        f"    child = await Child.start(['/bin/sh', '-c', {LEAVES!r}], os.environ, lambda line: "
        "print(line, flush=True))\n"
        "    await child.wait()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        line = ours.stdout.readline()
        assert len(left(line)) == 2
        ours.kill()
    eventually(lambda: not left(line))


async def test_a_child_that_ends_by_itself_leaves_its_code_and_its_last_line() -> None:
    lines: list[str] = []
    child = await Child.start(["/bin/sh", "-c", "printf 'no line end'; exit 3"], os.environ, lines.append)
    assert await child.wait() == 3
    assert await child.end() == 3
    assert lines == ["no line end"]


async def test_a_child_has_ended_when_its_main_process_has_whoever_it_leaves_behind() -> None:
    """What is left holds the log's pipe open."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    child = await Child.start(["/bin/sh", "-c", "sleep 1000 & echo $!; exit 3"], os.environ, lines.put_nowait)
    left = int(await lines.get())
    async with asyncio.timeout(60):
        assert await child.wait() == 3
    assert left in members(child.pid)
    assert await child.end() == 3
    assert members(child.pid) == []


def test_a_free_port_for_later_is_none_that_a_connection_could_take_meanwhile() -> None:
    ports = {free_port(ServerSettings(port=0)) for _ in range(5)}
    assert len(ports) > 1
    assert all(20_000 <= port < 32_000 for port in ports)
