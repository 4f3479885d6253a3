"""Hugging Face's transformers, tiny and randomly initialised; they need the extra ``zoo``."""

from typing import Any

import torch
from case import Task, case
from samples import labels, padding, rows, tokens
from torch import Tensor

FAMILY, WORDS, FEW = "transformers", 12, 4
IDS, MASK, CLASSES = tokens(5, WORDS, count=FEW), padding(5, count=FEW), labels(count=FEW)
CAUSAL = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.where(MASK == 1, IDS, -100)}


class Language(Task):
    """The usual module around one: self(**batch).loss."""

    lr = 0.01

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Tensor) -> Any:
        return self.net(**batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.log("train_loss", loss)
        return loss


def logits(module: Any, batch: Any) -> Tensor:
    return module(**batch).logits


def logits_of_experts(module: Any, batch: Any) -> Tensor:
    config = module.net.config
    before = config._experts_implementation
    config._experts_implementation = "eager"  # the grouped product has no float64
    try:
        return logits(module, batch)
    finally:
        config._experts_implementation = before


def add(
    name: str,
    about: str,
    *families: str,
    config: str,
    model: str,
    data: dict[str, Tensor],
    sizes: dict[str, Any],
    **rest: Any,
) -> None:
    """Add a model of transformers by the names of its classes, which are looked up when the case runs."""

    def make() -> Language:
        import transformers

        return Language(getattr(transformers, model)(getattr(transformers, config)(**sizes)))

    case(
        FAMILY,
        "dict batches",
        "output objects",
        "keyword and optional arguments",
        *families,
        data=rows(2, **data),
        make=make,
        name=name,
        about=about,
        needs="transformers",
        **({"call": logits} | rest),
    )(Language)


WIDTHS = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GQA = WIDTHS | {"num_key_value_heads": 1, "max_position_embeddings": 16}

add(
    "bert",
    "BertForSequenceClassification with dropout and a mask",
    "masks and lengths",
    config="BertConfig",
    model="BertForSequenceClassification",
    data={"input_ids": IDS, "attention_mask": MASK, "labels": CLASSES},
    sizes=WIDTHS | {"num_labels": 3, "max_position_embeddings": 16},
)
add(
    "gpt2",
    "GPT2LMHeadModel with tied embeddings, labels = input_ids",
    "sequence and image outputs",
    config="GPT2Config",
    model="GPT2LMHeadModel",
    data=CAUSAL,
    sizes={
        "vocab_size": WORDS,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
)
add(
    "llama",
    "LlamaForCausalLM",
    "sequence and image outputs",
    config="LlamaConfig",
    model="LlamaForCausalLM",
    data=CAUSAL,
    sizes=GQA,
)
add(
    "mixtral",
    "MixtralForCausalLM: two of three experts per token",
    "sequence and image outputs",
    config="MixtralConfig",
    model="MixtralForCausalLM",
    data=CAUSAL,
    sizes=GQA | {"num_local_experts": 3, "num_experts_per_tok": 2},
    call=logits_of_experts,
)
add(
    "t5",
    "T5ForConditionalGeneration: labels in, logits of the decoder out",
    "seq2seq",
    "sequence and image outputs",
    config="T5Config",
    model="T5ForConditionalGeneration",
    data={"input_ids": IDS, "attention_mask": MASK, "labels": tokens(3, WORDS, count=FEW, seed=20)},
    sizes={
        "vocab_size": WORDS,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
)
add(
    "vit_of_transformers",
    "ViTForImageClassification on pixel_values",
    config="ViTConfig",
    model="ViTForImageClassification",
    data={"pixel_values": torch.randn(FEW, 3, 8, 8, generator=torch.Generator().manual_seed(21)), "labels": CLASSES},
    sizes={
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 3,
    },
)
