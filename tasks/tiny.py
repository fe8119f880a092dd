"""The toy tasks' tokenizer, and tiny random models of the real architectures for smoke runs."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from feedback import Context
from tasks.toy import SUBSETS, TEMPLATES

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """BPE trained on the warm-up texts of all three tasks. Every digit and every common word is one token."""
    texts = []
    for task in (subset() for subset in SUBSETS.values()):
        rng = random.Random(1)
        for example in (task.example(rng) for _ in range(2000)):
            context = example.get("context") or Context("")
            said = (context.solution, context.feedback, context.critique, example.get("attempt", ""), example["answer"])
            texts.append("\n".join([example["messages"][0]["content"], *said]))
    texts += ["user\nassistant\n" + TEMPLATES.solution + TEMPLATES.feedback + TEMPLATES.critique] * 2000
    texts += [TEMPLATES.closing + TEMPLATES.request] * 2000
    bpe = Tokenizer(models.BPE(unk_token="<|unk|>"))
    words = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\n|\s"), "isolated")
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([words, BYTES]), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    # Printable ASCII, space and newline: more rows in the vocabulary would only cost time.
    alphabet = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    settings = dict(vocab_size=512, min_frequency=20, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **settings))
    tokens = dict(pad_token=special[0], eos_token=special[2], unk_token=special[3])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **tokens)


# ---- Models for a smoke test -------------------------------------------------------------------------------

FIXTURES = Path(__file__).parent / "fixtures"


def smoke_model(task: str, family: str, folder: Path) -> None:
    """Writes a model of the family (qwen3 or olmo3) with 2 layers and random weights, and a byte tokenizer. Whole answers from
    the task's fixtures are tokens too, so the model is sometimes right and every path of a training step runs."""
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = BYTES, decoders.ByteLevel()
    tokens = dict(pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:2])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **tokens)
    rows = (FIXTURES / f"{task}_responses.jsonl").read_text().splitlines()
    tokenizer.add_tokens(list(dict.fromkeys(json.loads(row)["response"] for row in rows)))
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32768, initializer_range=0.05,
        pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
