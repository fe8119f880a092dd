"""What several test files need: the repository root on the import path, the toy tokenizer, tiny random models, and the
one computation they are checked against, a plain forward pass over one unpadded sequence."""

import json
import math
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the sources are one folder up; pytest may start anywhere
import tasks  # noqa: E402
from tasks import tiny  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    config.option.log_level = config.option.log_level or "WARNING"  # a failing test would print pages of the libraries' records
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is ")  # pytest forgets the product's own filter
    config.addinivalue_line("markers", "slow: time-outs, throughput, whole data sets; run by `bash run.sh test-slow`")
    config.addinivalue_line("markers", "gpu: what only a CUDA device tells; run by `bash run.sh test-gpu`")
    config.addinivalue_line("markers", "vllm: the real engine; run by `bash run.sh test-vllm`")
    config.addinivalue_line("markers", "real: a real checkpoint; run by `bash run.sh test-real`")


# OLMo3's sliding window is shorter than the test sequences, so that it matters.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen3-untied": (Qwen3Config, Qwen3ForCausalLM, dict(tie_word_embeddings=False, head_dim=16)),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])),
    "llama": (LlamaConfig, LlamaForCausalLM, dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
}


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.build_tokenizer()


CHAT = (  # a template that takes system messages and, like Qwen3's, closes the thought when thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token per byte, so that every text can be written, and the special tokens of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT, **tokens)


def tiny_network(family: str = "qwen3-tied", vocabulary: int = 40, dtype: torch.dtype = torch.float64, **changes):
    """2 layers, hidden size 32, random weights, EOS 2; the same at every call. changes: other settings of the configuration."""
    config, network, extra = FAMILIES[family]
    torch.manual_seed(0)
    settings = dict(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    return network(config(**settings | extra | changes)).to(dtype)


make_model = pytest.fixture(scope="session")(lambda: tiny_network)


@pytest.fixture(scope="session")
def plain_logits():
    """plain_logits(model, prompt, response): (T, V), the rows of model(prompt + response).logits that predict response
    token t, which stand at len(prompt) - 1 + t. No padding, no batch, no code of ours."""

    def forward(model, prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        return logits[len(prompt) - 1 : len(prompt) - 1 + len(response)]

    return forward


def log_of(out: Path, kind: str | None = "train") -> list[dict]:
    """The rows of a run's log, of one kind or (None) all; nan is not JSON."""
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def reply_with(text, told=()):
    """An answer to a conversation. told: (token, its probability, {other token: its probability}) of each token, where the
    server tells them."""
    one = lambda token, p, **more: {"token": token, "logprob": math.log(p), "bytes": None, **more}  # noqa: E731
    content = [one(token, p, top_logprobs=[one(*other) for other in top.items()]) for token, p, top in told]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": content} if told else None
    return 200, {"id": "1", "object": "", "created": 0, "model": "m", "choices": [choice]}


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server. A test sets `answer(body, attempt)`, which gives (status, JSON or text); `seen` holds
    (path, authorization, body) of the requests; reply_with(text) is an answer of the protocol."""
    seen, attempts = [], Counter()
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01, raising=False)  # half a second

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = body["messages"][-1]["content"]
            attempts[said] += 1
            seen.append((self.path, self.headers["Authorization"], body))
            status, answer = handle.answer(body, attempts[said])
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(OSError):  # the client may have given up
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    handle = SimpleNamespace(
        url=f"http://127.0.0.1:{listening.server_port}/v1", seen=seen, attempts=attempts, reply_with=reply_with
    )
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()  # shutdown waits so long
    yield handle
    listening.shutdown()
    listening.server_close()


def fewer_validation_problems(patch):
    load = tasks.load

    def fewer(*args):
        task = load(*args)
        task.validation = task.validation[:4]
        return task

    patch.setattr(tasks, "load", fewer)


small_validation = pytest.fixture(lambda monkeypatch: fewer_validation_problems(monkeypatch))
