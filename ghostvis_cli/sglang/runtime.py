"""SGLang as installed here: whether it can be used, and with which arguments. Imports neither SGLang nor torch.

`arguments` and `environment` are for both uses: `serve` turns them into flags, the engine into keyword arguments.
"""

import json
import os
import sys
from collections.abc import Mapping
from ctypes import CDLL, byref, c_int
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ghostvis_cli.convert.directory import CONFIG, read_json
from ghostvis_cli.errors import EngineError

if TYPE_CHECKING:
    from ghostvis_cli.profile import Profile

OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)  # both tested with the plug-in
CPU_VARIABLE = "SGLANG_USE_CPU_ENGINE"
INSTALL = "pip install 'ghostvis-cli[sglang]' in an environment of its own, or --engine local"
# On a CPU SGLang would take most of the memory for keys and values, and other programs need it too.
CPU_CACHE_BYTES = 2 * 2**30
CPU_CONTEXTS = 4  # of full length, which requests rarely have
CPU_RUNNING_REQUESTS = 16
# On a GPU tokens come faster than people read, and each message of a stream costs processor time in SGLang's one
# interpreter: the first token is sent at once, then so many together.
STREAM_INTERVAL = 4
HOPPER = 9  # the major compute capability of H100 and H200
MOST_IMAGE_THREADS = 16
MOST_TOKENIZER_WORKERS, CORES_A_WORKER = 4, 4
NANOCHAT = "ghostvis_nanochat"  # model_type of nanochat's generations of 2026
STOCK, OURS = (
    "Qwen3ForCausalLM",
    "GhostVisForCausalLM",
)  # a converted swiglu text model, in plain SGLang and here
Value = str | int | float | bool
WeightsDtype = Literal["bfloat16", "float16", "float32"]


def version() -> str | None:
    """The version that is installed; None without SGLang."""
    if find_spec("sglang") is None:
        return None
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def is_at_least(*release: int) -> bool:
    """Whether the installed version is this release or a later one."""
    found = version()
    return found is not None and _release(found) >= release


def why_not(*, device: str = "auto", explicit: bool = False) -> str | None:
    """Why SGLang can't be used here, as part of a sentence; None where it can.

    explicit  SGLang was asked for by name: then a machine without a GPU is accepted, though slow
    """
    found = version()
    if found is None:
        return "SGLang is not installed"
    if sys.platform != "linux":
        return "SGLang runs on Linux only"
    if not OLDEST <= _release(found) <= NEWEST:
        return f"SGLang {found} is installed, and {_dotted(OLDEST)} to {_dotted(NEWEST)} are supported"
    if device == "mps":
        return "SGLang does not run on mps"
    if is_cpu(device) and not explicit and os.environ.get(CPU_VARIABLE) != "1":
        return "there is no CUDA device" if device == "auto" else f"the device is {device}"
    if device.startswith("cuda") and not cuda_devices():
        return "there is no CUDA device"
    return None


def require(*, device: str = "auto") -> str:
    """The installed version. EngineError where SGLang can't be used."""
    if reason := why_not(device=device, explicit=True):
        raise EngineError(reason, hint=INSTALL)
    found = version()
    assert found is not None, "why_not has said so"
    return found


def is_cpu(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not cuda_devices())


@cache
def cuda_devices() -> int:
    """How many devices this process sees, from the driver itself, since importing torch takes seconds."""
    try:
        driver = CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(byref(count)) != 0:
        return 0
    return count.value


@cache
def major_capability() -> int:
    """Of the first CUDA device's compute capability; 0 without a device."""
    if not cuda_devices():
        return 0
    driver, device, found = CDLL("libcuda.so.1"), c_int(0), c_int(0)
    of_major = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    if driver.cuDeviceGet(byref(device), 0) or driver.cuDeviceGetAttribute(byref(found), of_major, device):
        return 0
    return found.value


def weights_dtype(profile: "Profile") -> WeightsDtype:
    """The type of weights and arithmetic: bfloat16 for GPUs; float32 for a CPU, where it is exact and no slower."""
    dtype = profile.engine.dtype
    if dtype == "auto":
        return "float32" if is_cpu(profile.engine.device) else "bfloat16"
    return dtype


def arguments(profile: "Profile", directory: Path, *, name: str | None = None) -> dict[str, Value]:
    """SGLang's server arguments for a converted directory, by their names in Python.

    `lpm` (longest prefix match) instead of first come, first served: questions about one image are scheduled one
    after another while its positions are cached, instead of evicting each other's.
    """
    engine, config = profile.engine, read_json(directory, CONFIG)
    found: dict[str, Value | None] = {
        "model_path": str(directory),
        "served_model_name": name,
        "dtype": weights_dtype(profile),
        "tp_size": engine.tensor_parallel_size,
        "dp_size": engine.data_parallel_size,
        "mem_fraction_static": engine.gpu_memory_utilization,
        "context_length": engine.context_length or _windowed_context(profile, config),
        "schedule_policy": engine.schedule_policy,
        "attention_backend": engine.attention_backend,
        "random_seed": profile.sampling.seed,
        "enable_metrics": True,
        "enable_cache_report": True,
        "constrained_json_disable_any_whitespace": True,  # a model might generate nothing else until its limit
        "sampling_defaults": "model",
        "tokenizer_worker_num": 1,  # more only with `serve`, whose launcher loads the plug-in in them
        **_device(profile, config),
    }
    if architectures(config) != config["architectures"]:
        found["json_model_override_args"] = json.dumps({"architectures": architectures(config)})
    template = directory / "chat_template.jinja"
    if template.exists():  # else SGLang may guess one from the path
        found["chat_template"] = str(template)
    return {key: value for key, value in found.items() if value is not None}


def _windowed_context(profile: "Profile", config: Mapping[str, Any]) -> int | None:
    """The trained length where longer contexts need two window lengths and the attention kernels support one."""
    text, engine = config.get("text_config", config), profile.engine
    two_lengths = len(set(text.get("window_sizes") or ())) > 1
    if not two_lengths or is_cpu(engine.device) or engine.attention_backend == "fa3":
        return None
    return int(text["trained_positions"])


def _device(profile: "Profile", config: Mapping[str, Any]) -> dict[str, Value | None]:
    device = profile.engine.device
    if is_cpu(device):
        return {
            "device": "cpu",
            "max_total_tokens": _cpu_tokens(config, profile),
            "max_running_requests": CPU_RUNNING_REQUESTS,
            "sleep_on_idle": True,  # else its idle scheduler keeps one of the few cores busy
        }
    _, _, index = device.partition(":")
    return {
        "device": "cuda",
        "base_gpu_id": int(index) if index else None,
        "cuda_graph_backend_prefill": _prefill_graphs(profile, config),
        "stream_interval": STREAM_INTERVAL,
    }


def _prefill_graphs(profile: "Profile", config: Mapping[str, Any]) -> str:
    """The kind of CUDA graphs for prefill, which SGLang leaves off for vision models that it does not know.

    `full`: one launch instead of some 500, on Hopper, whose FlashAttention-3 can be captured for prompts of mixed
    lengths; tested with 0.5.17, and left to the user with later ones. `breakable`, SGLang's own choice for text:
    attention stays outside, 33 launches. `disabled` where the plug-in refuses both (its `limits`).
    """
    text = config.get("text_config", config)
    if text.get("model_type") == NANOCHAT and (text.get("smear", True) or "vision_config" in config):
        return "disabled"
    is_fa3 = profile.engine.attention_backend in (None, "fa3") and major_capability() == HOPPER
    return "full" if is_fa3 and not is_at_least(0, 5, 18) else "breakable"


def _cpu_tokens(config: Mapping[str, Any], profile: "Profile") -> int:
    """Positions that fit CPU_CACHE_BYTES: at least one whole context, at most CPU_CONTEXTS."""
    text = config.get("text_config", config)
    itemsize = 4 if weights_dtype(profile) == "float32" else 2
    per_token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * itemsize
    context = profile.engine.context_length or text["max_position_embeddings"]
    return int(max(context + 1, min(CPU_CONTEXTS * context, CPU_CACHE_BYTES // per_token)))


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The model class: ours in place of Qwen3's. It checks for missing tensors and can round as training did."""
    return [OURS if name == STOCK else name for name in config["architectures"]]


def environment(profile: "Profile") -> dict[str, str]:
    """Variables for SGLang's processes, besides this process's environment."""
    found = {
        "HF_HUB_OFFLINE": "1",  # everything is in the directory
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_MM_BUFFER_SIZE_MB": "0",  # for hashing images on the GPU; ours are hashed already
    }
    if not is_cpu(profile.engine.device):
        return found | _unless_set(_for_threads())
    found[CPU_VARIABLE] = "1"
    # A CPU that computes one prompt for 20 s fails SGLang's health check, which then prevents draining.
    found["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    ranks = profile.engine.tensor_parallel_size * profile.engine.data_parallel_size
    if ranks > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
        found["SGLANG_CPU_OMP_THREADS_BIND"] = share_cores(sorted(os.sched_getaffinity(0)), ranks)
    return found


def _for_threads() -> dict[str, str]:
    """One thread for the main process's small tensor copies: after each, OpenMP's would spin on all cores."""
    readers = min(MOST_IMAGE_THREADS, len(os.sched_getaffinity(0)))
    return {"OMP_NUM_THREADS": "1", "SGLANG_IO_WORKERS": str(readers)}


def tokenizer_workers(profile: "Profile") -> int:
    """How many processes of `serve` take requests: a quarter of the cores, since one can't keep a GPU busy."""
    if is_cpu(profile.engine.device):
        return 1
    return max(1, min(MOST_TOKENIZER_WORKERS, len(os.sched_getaffinity(0)) // CORES_A_WORKER))


def _unless_set(values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if name not in os.environ}


def share_cores(cores: list[int], ranks: int) -> str:
    """The cores of each rank, in SGLang's form: "0,1|2,3". With fewer cores than ranks some share."""
    share = max(1, len(cores) // ranks)
    parts = [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)


def _release(text: str) -> tuple[int, ...]:
    """0.5.23.post1 -> (0, 5, 23)."""
    numbers = [int(part) for part in text.split("+")[0].split(".")[:3] if part.isdigit()]
    return tuple(numbers)


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
