"""What every test stands on: JAX on the CPU, a compilation cache, quick compiling, and Hypothesis without deadlines.

pytest imports this file before any test module, hence before JAX reads its environment.
"""

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ON_GPU = os.environ.get("REALM_TEST_GPU") == "1"  # set it to run tests/gpu on the machine's accelerator
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"

# No test reads or warms the user's own compilation cache, or reads their tile sizes. All processes of a run share one
# folder (the workers have it from the process that starts them; notebooks and commands from the test that does), and
# whatever one of them compiles is kept there: fetching a program takes milliseconds, compiling it a hundred.
for _name in ("REALM_JAX_CACHE", "REALM_TILES"):
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="realm-test-cache-", ignore_cleanup_errors=True)
    os.environ["XDG_CACHE_HOME"] = _cache.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(_cache.name, "xla"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["MPLCONFIGDIR"] = _cache.name
os.environ["MPLBACKEND"] = "agg"

# Every program that XLA compiles for the CPU maps memory, and Linux allows a process 65,530 maps: one more, and the
# process is aborted. A worker that has more than this many at the end of a file forgets what it compiled.
MAX_MAPS = 20_000

# A worker takes whole files: the long ones come first, so that none is left for the end.
LONG_FILES = (
    "test_notebooks.py",
    "test_speculative.py",
    "test_lora.py",
    "test_lora_merge.py",
    "test_engine.py",
    "test_finetune.py",
    "test_quant_encode.py",
)

# Compiling is most of the time that tests take, and without LLVM's optimizations it takes a third less. What tests say
# of servers, loops, files, and kernels in Pallas' interpreter does not depend on them. These files are about numbers,
# to the bit or against those of llama.cpp: they run the machine code that users run, and so does whatever a test starts
# as a process of its own, with which two of them compare theirs.
OPTIMIZED_FILES = (
    "test_assets.py",
    "test_finetune_run.py",
    "test_lora_golden.py",
    "test_matmul.py",
    "test_model.py",
    "test_quant_encode.py",
    "test_quant_formats.py",
    "test_quant_iq.py",
    "test_quant_tensor.py",
    "test_train_tiny.py",
)

# The first call of a jitted function compiles: its time says nothing.
settings.register_profile("realm", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("realm")


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark those of slow_tests.txt, put long files first, and skip tests/gpu unless REALM_TEST_GPU=1 asks for them."""
    lines = set(Path(__file__).with_name("slow_tests.txt").read_text(encoding="utf-8").splitlines())
    for item in items:
        name = f"{item.path.name}::{item.name}"
        if {name, name.partition("[")[0], item.path.name} & lines:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place)
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with REALM_TEST_GPU=1")
    for item in items:
        if "gpu" in item.path.parts[len(config.rootpath.parts) :]:
            item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    """Let JAX compile, in silence, what another worker is writing to the shared cache at this moment."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry:UserWarning")


def _place(item: pytest.Item) -> tuple[int, bool]:
    """Sorts tests: long files, then those of OPTIMIZED_FILES one after the other, then the rest."""
    name = item.path.name
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES), name not in OPTIMIZED_FILES


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_a_file(request: pytest.FixtureRequest):
    """Compile as the file wants it, and keep what another has compiled only if that was compiled alike.

    Afterwards drop everything that is compiled if the process is on its way to more maps than it may have.
    """
    import jax

    quickly = not ON_GPU and request.path.name not in OPTIMIZED_FILES
    if jax.config.read("jax_disable_most_optimizations") != quickly:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()
    yield
    if _has_many_maps():
        jax.clear_caches()
        gc.collect()


def _has_many_maps() -> bool:
    """Whether this process has mapped more than MAX_MAPS regions of memory; True where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n") > MAX_MAPS
    except OSError:  # not Linux
        return True


def _byte_vocabulary() -> dict:
    """Metadata of a small byte-level BPE vocabulary: two control tokens, 256 bytes, three merges; 261 tokens."""
    from realm_jax.gguf.types import field
    from realm_jax.gguf.unicode import byte_characters

    letters = list(byte_characters())
    merges = ["t h", "th e", "i n"]
    tokens = ["<s>", "</s>", *letters, *(merge.replace(" ", "") for merge in merges)]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
    }
    fields = {f"tokenizer.ggml.{key}": field(value) for key, value in values.items()}
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}[assistant]"
    return fields | {"tokenizer.chat_template": field(template)}


@pytest.fixture(scope="session")
def make_model_file(tmp_path_factory):
    """A function (name, seed=0, format="F32", vocabulary=...) -> path of a small random model with a vocabulary."""
    import jax

    from realm_jax.model import Config, Rope, init_params
    from realm_jax.model.files import export

    folder = tmp_path_factory.mktemp("models")

    def make(name: str, seed: int = 0, format: str = "F32", vocabulary: dict | None = None) -> Path:
        fields = _byte_vocabulary() if vocabulary is None else vocabulary
        config = Config(
            architecture="llama", vocab_size=len(fields["tokenizer.ggml.tokens"].value), context_length=96, layers=2,
            width=64, ffn_width=96, heads=4, kv_heads=2, head_width=16, norm_eps=1e-5, rope=Rope(dimensions=16),
        )  # fmt: skip
        params = init_params(config, jax.random.key(seed))
        export(folder / name, config, params, fields, lambda _name, shape: format if shape[-1] % 32 == 0 else "F32")
        return folder / name

    return make


@pytest.fixture(scope="session")
def model_file(make_model_file) -> Path:
    """A small random model in F32 with a vocabulary of 261 tokens and a context of 96."""
    return make_model_file("small.gguf")


@pytest.fixture(scope="session")
def byte_vocabulary() -> dict:
    """Metadata fields of the vocabulary that `model_file` has."""
    return _byte_vocabulary()


@pytest.fixture
def cuda_plugin():
    """For tests that compile for a GPU that is not there: they are skipped where JAX's plugin for that is not."""
    import offline_gpu
    from realm_jax.errors import RealmError

    try:
        offline_gpu.require_plugin()
    except RealmError as error:
        pytest.skip(str(error))


@pytest.fixture
def for_an_h200(monkeypatch):
    """Within it, what is traced is for a GPU: kernels are not for the interpreter. JAX 0.11 wants to know which GPU."""
    import jax

    from realm_jax.kernels import pallas

    monkeypatch.setattr(pallas, "_interpreting", False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield
