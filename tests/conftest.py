"""Tiny random models, a tiny tokenizer, a process group of one and a sandbox, shared by the tests.

One thread per process: the models are too small for two, and results then do not depend on it.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a bare `pytest` does not put the repository's root there
os.environ["OMP_NUM_THREADS"] = "1"  # whatever the shell says: one that has threads cannot fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="many ranks, nodes, model families too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless --slow is given")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    # A process that has a process group must not fork: in each file, tests without one come first.
    files = {path: i for i, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (files[item.path], "ranks" in item.fixturenames))


def quick(some, values):
    """Parameters: `some` of the values are tried always, the others with --slow."""
    return [v if v in some else pytest.param(v, marks=pytest.mark.slow) for v in values]


WORDS = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(58))]
VOCABULARY, PAD, EOS = len(WORDS), 0, 1
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gpt_neox")


def tiny_config(architecture, **changes):
    """A transformers configuration: 2 layers, width 32, weights so large that logits differ."""
    from transformers import AutoConfig

    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    names |= {"intermediate_size": 64, "max_position_embeddings": 128}
    if architecture == "gpt2":
        names = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    elif architecture != "gpt_neox":
        names |= {"num_key_value_heads": 2}
    if architecture in ("gemma2", "gemma3_text", "mistral"):
        names |= {"head_dim": 8, "sliding_window": 5}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    return AutoConfig.for_model(
        architecture,
        **({"vocab_size": VOCABULARY, "initializer_range": 0.2} | names | special | changes),
    )


def seeded(build, config, seed=0):
    """build(config) with fp32 weights drawn from a seed, dropout off; global state is restored."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # biases and norms start as 0 and 1, where errors cannot be seen
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_lm(architecture, seed=0, **changes):
    from transformers import AutoModelForCausalLM

    return seeded(AutoModelForCausalLM, tiny_config(architecture, **changes), seed)


def tiny_classifier(architecture, seed=0, **changes):
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(architecture, **({"num_labels": 1} | changes))
    return seeded(AutoModelForSequenceClassification, config, seed)


def tiny_tokenizer(words=WORDS, template=None):
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=words[3]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


def tokens_of(tokenizer=None, style="plain", limit=100, policy="", stop=None):
    """What ids mean to a policy with this tokenizer."""
    from pfppo.data import Tokens

    tokenizer = tokenizer or tiny_tokenizer()
    stop = stop or [tokenizer.eos_token_id]
    return Tokens(policy, tokenizer, stop, stop[0], 0, len(tokenizer), [], style, style, limit)


def write_model(folder, model, tokenizer=None):
    """A checkpoint as transformers writes it; returns the folder's name."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def ragged(lengths, seed=0):
    """Prompts of these lengths, without special tokens."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def policy_of(lm, ranks):
    """A causal LM as a sharded policy."""
    from pfppo.fsdp import shard
    from pfppo.loading import Whole
    from pfppo.model import Policy, empty_causal_lm

    return shard(Policy(empty_causal_lm(lm.config)), Whole(Policy(lm)), ranks)


def scalar_of(classifier, ranks):
    """A classifier as a sharded scalar model."""
    from pfppo.fsdp import shard
    from pfppo.loading import Whole
    from pfppo.model import ScalarModel, empty_classifier

    empty = ScalarModel(empty_classifier(classifier.config))
    return shard(empty, Whole(ScalarModel(classifier)), ranks)


def files_of(folder):
    """{relative path: contents} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder, *rows):
    """A JSONL file of objects, and of lines that stand as they are."""
    path = folder / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@contextlib.contextmanager
def full_disk(size=100):
    """No file of this process can grow beyond `size` bytes: writes raise OSError."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def out_of_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def words_of(**options):
    """A command line: --name value of each."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def ranks():
    """A process group of one rank, left at the end of the module."""
    from pfppo.fsdp import init_ranks

    import torch.distributed as dist

    yield init_ranks("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sandbox():
    from pfppo.sandbox import Sandbox

    with Sandbox(workers=2, timeout=1.0, memory_mb=256) as shared:
        yield shared


@pytest.fixture(scope="module")
def passed():
    """Verdicts of checks: bools."""
    from pfppo.sandbox import Sandbox

    with Sandbox(workers=1) as sandbox:
        yield lambda *checks: [verdict.passed for verdict in sandbox.run(list(checks))]


@pytest.fixture(scope="session")
def lms():
    """{architecture: causal LM}, made once; tests leave the weights as they are."""
    return {name: tiny_lm(name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random policy, problems, and a reward model taught a little."""
    from running import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny policy's."""
    return shutil.copytree(tiny / "policy", tmp_path / "policy")


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A finished run of four steps."""
    import train_ppo

    from running import options, run

    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    run(train_ppo, *options(tiny, run_dir, steps=4, save_every=2))
    return run_dir
