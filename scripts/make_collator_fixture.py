#!/usr/bin/env python3
"""Write the sequences that TRL's own code prepares and collates from small rows, and which of their tokens it scores.

    python scripts/make_collator_fixture.py crates/align/tests/fixtures/collators.json

No rule of TRL is typed again here. Rows go through `maybe_extract_prompt` where a case asks for it, then through
`_prepare_dataset` of its DPOTrainer, KTOTrainer or SFTTrainer, which are not constructed, as they would load a model, and
then as one batch through its collator for preference, unpaired preference or language modeling. The cases follow what TRL's
documentation and docstrings say it takes: explicit and implicit prompts, texts and conversations, several turns, system
messages, unpaired rows, and its truncation modes. The texts are made up.

    tokenizers  made here: `bytes` (byte-level BPE, which adds BOS) and `pieces` (as SentencePiece writes Llama 2's: a space
                before every text, byte fallback, BOS)
    cases       rows, objective, tokenizer, chat template, max_length and truncation_mode (both may be null), and
                `sequences`: for each row that is left, in order, and each of its responses, ids and completion_mask
                without padding, and the label where there is one
    ids         the rows of ids in the docstring of DataCollatorForPreference, collated
"""

import argparse
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import datasets
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from trl.data_utils import maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fixture_tools import write_json

BOS, EOS = "<s>", "</s>"

# a line end after EOS, as ChatML's
TAILED = ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
# no white space after EOS, BOS in front
TERSE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}[assistant] {% endif %}")
# neither BOS nor EOS
SILENT = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}assistant: {% endif %}")
# asks with an empty thought that answered conversations do not have
THINKING = TAILED.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think></think>{% endif %}")


# --- tokenizers


def merged(words: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that make each word one token, from its left; adds what they make to the vocabulary."""
    merges = []
    for word in words:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary.setdefault("".join(pair), len(vocabulary))
    return merges


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def bytes_tokenizer() -> Tokenizer:
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = merged(["Ġthe", "Ġof", "Ġoak", "Ġelm", "four", "hundred"], vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS)])
    return with_bos(tokenizer)


def pieces_tokenizer() -> Tokenizer:
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(0x21, 0x7F))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = merged(["▁the", "▁of", "▁oak", "▁elm", "four", "hundred"], vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", BOS, EOS)])
    return with_bos(tokenizer)


TOKENIZERS = {"bytes": bytes_tokenizer(), "pieces": pieces_tokenizer()}


# --- rows


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


TEXTS = [{"prompt": "The bark of the oak is", "chosen": " rough.", "rejected": " smooth."},
         {"prompt": "Two and two are", "chosen": " four.", "rejected": " four hundred, I am sure of it."}]
QUESTIONS = [user("Which tree has acorns?"), user("Name the month after May.")]
ANSWERS = [("The oak.", "The elm has them, as far as I know."), ("June.", "July.")]
EXPLICIT = [{"prompt": [question], "chosen": [assistant(good)], "rejected": [assistant(bad)]}
            for question, (good, bad) in zip(QUESTIONS, ANSWERS)]
IMPLICIT = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in EXPLICIT]
TURNS = [system("You are brief, in any script: Þ, ж, 木."), user("Which tree has acorns?"), assistant("The oak."),
         user("  And\twhich has keys?\n")]
SEVERAL_TURNS = [{"chosen": TURNS + [assistant("Ash.")], "rejected": TURNS + [assistant("  None.\n")]}]
BESIDE = [{"prompt": row["prompt"][0]["content"], **both} for row, both in zip(EXPLICIT, IMPLICIT)]
UNPAIRED_TEXTS = [{"prompt": TEXTS[0]["prompt"], "completion": " rough.", "label": True},
                  {"prompt": TEXTS[0]["prompt"], "completion": " as smooth as glass.", "label": False},
                  {"prompt": TEXTS[1]["prompt"], "completion": " four.</s>", "label": True}]
UNPAIRED = [{"prompt": TURNS, "completion": [assistant("Ash.")], "label": True},
            {"prompt": [QUESTIONS[0]], "completion": [assistant("The elm.")], "label": False}]
# two turns of hh-rlhf's kind, which say the same at first
TRANSCRIPT = "\n\nHuman: Which tree has acorns?\n\nAssistant: The oak"
LONG = [{"prompt": " the" * words, "chosen": " oak" * 5, "rejected": " elm"} for words in range(1, 7)]


def cases() -> list[dict]:
    """The cases without what TRL makes of them; `extract` says whether prompts are extracted first."""
    found = []

    def case(name: str, objective: str, rows: list[dict], tokenizer: str = "bytes", template: str | None = None,
             max_length: int | None = None, truncation_mode: str | None = None, extract: bool = False) -> None:
        found.append({"name": name, "objective": objective, "tokenizer": tokenizer, "template": template, "rows": rows,
                      "max_length": max_length, "truncation_mode": truncation_mode, "extract": extract})

    for tokenizer in TOKENIZERS:
        case(f"texts, {tokenizer}", "dpo", TEXTS, tokenizer)
        case(f"explicit prompts, {tokenizer}", "dpo", EXPLICIT, tokenizer, TERSE)
        case(f"implicit prompts, {tokenizer}", "dpo", IMPLICIT, tokenizer, TERSE)
        case(f"unpaired texts, {tokenizer}", "kto", UNPAIRED_TEXTS, tokenizer)
        case(f"unpaired conversations, {tokenizer}", "kto", UNPAIRED, tokenizer, TERSE)
    case("a template with a tail", "dpo", EXPLICIT, template=TAILED)
    case("several turns", "dpo", SEVERAL_TURNS, template=TAILED)
    case("prompts beside whole conversations", "dpo", BESIDE, template=TAILED, extract=True)
    case("EOS that is written already", "dpo", [{"prompt": "Stop", "chosen": " now.</s>", "rejected": " it."}])
    # one of the prompts has 42 tokens, the other 43, and all three texts have 15
    for max_length in (42, 43, 44, 48, 60):
        case(f"conversations of {max_length}", "dpo", EXPLICIT, template=TERSE, max_length=max_length,
             truncation_mode="keep_start")
    for max_length in (15, 16, 19, 25, 36):
        case(f"unpaired texts of {max_length}", "kto", UNPAIRED_TEXTS, max_length=max_length)
    case("prompts of every length", "dpo", LONG, max_length=7, truncation_mode="keep_start")
    case("pairs that are unpaired", "kto", EXPLICIT, template=TAILED)
    case("texts that are unpaired", "kto", TEXTS, tokenizer="pieces")
    case("demonstrations as texts", "sft", [{key: row[key] for key in ("prompt", "completion")} for row in UNPAIRED_TEXTS])
    case("demonstrations", "sft", [{key: row[key] for key in ("prompt", "completion")} for row in UNPAIRED], template=TAILED)
    case("demonstrations that are cut", "sft",
         [{key: row[key] for key in ("prompt", "completion")} for row in UNPAIRED_TEXTS], max_length=25,
         truncation_mode="keep_start")

    # what follows is not the same in sacpo, or refused there
    case("tokens merge across the boundary", "dpo",
         [{"prompt": "The tree is the ", "chosen": "oak.", "rejected": "elm."}])
    case("tokens merge across one of two boundaries", "dpo",
         [{"prompt": "The tree is the ", "chosen": "oak.", "rejected": "(unknown)"}])
    case("tokens merge within a word", "dpo", [{"prompt": "Two and two are fo", "chosen": "ur.", "rejected": "rty."}],
         tokenizer="pieces")
    case("tokens merge behind a template", "dpo",
         [{"prompt": [QUESTIONS[0]], "chosen": [assistant("the oak.")], "rejected": [assistant("elm")]}], template=TERSE)
    case("BOS that is written already", "dpo", [{"prompt": "<s>Stop", "chosen": " now.", "rejected": " it."}])
    case("EOS inside a response", "dpo", [{"prompt": "Stop", "chosen": " now.</s> Not yet.", "rejected": " it."}])
    case("a template without EOS", "dpo", EXPLICIT[1:], template=SILENT.replace("{% for", "{{ bos_token }}{% for", 1))
    case("a template without BOS", "dpo", EXPLICIT[1:], tokenizer="pieces", template=SILENT.replace("\n", "{{ eos_token }}"))
    case("a tail that is scored", "dpo", EXPLICIT[1:], template=TAILED)
    case("the beginning is cut", "dpo", EXPLICIT[1:], template=TERSE, max_length=30, truncation_mode="keep_end")
    case("the beginning of a response is cut", "dpo",
         [{"prompt": "Go on:", "chosen": " one two three four", "rejected": " no"}], max_length=10,
         truncation_mode="keep_end")
    case("transcripts", "dpo",
         [{"chosen": TRANSCRIPT + ".", "rejected": TRANSCRIPT + ", or the elm."}], template=TERSE)
    case("texts without a prompt", "dpo", [{"chosen": "The oak is a tree.", "rejected": "The oak is a train."}])
    case("a text that begins as another", "dpo", [{"chosen": "The oak is", "rejected": "The oak is not"}])
    case("a prompt that is rendered otherwise", "dpo", EXPLICIT[1:], template=THINKING)
    case("a prompt without room", "dpo", TEXTS, max_length=15, truncation_mode="keep_start")
    case("two responses that are the same", "dpo", [{"prompt": "Stop", "chosen": " now.", "rejected": " now. "}])
    case("a blank response", "dpo", [{"prompt": "Stop", "chosen": " now.", "rejected": " "}])
    case("a prompt that ends with the assistant", "dpo",
         [{"prompt": [QUESTIONS[0], assistant("I think")], "chosen": [assistant("the oak.")],
           "rejected": [assistant("the elm.")]}], template=TERSE)
    case("a response of two turns", "dpo",
         [{"prompt": [QUESTIONS[0]], "chosen": [assistant("The oak."), user("Sure?"), assistant("Yes.")],
           "rejected": [assistant("None.")]}], template=TERSE)
    case("conversations that part early", "dpo",
         [{"chosen": [QUESTIONS[0], assistant("The oak."), user("Sure?"), assistant("Yes.")],
           "rejected": [QUESTIONS[0], assistant("The elm."), user("Sure?"), assistant("No.")]}], template=TERSE)
    case("messages", "sft", [{"messages": TURNS[1:3] + [user("Sure?"), assistant("Yes.")]}], template=TERSE)
    return found


# --- TRL


def prepared(case: dict, tokenizer: transformers.PreTrainedTokenizerBase) -> datasets.Dataset:
    rows = [maybe_extract_prompt(row) for row in case["rows"]] if case["extract"] else case["rows"]
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0,
                              completion_only_loss="prompt" in rows[0], chat_template=None)
    options = SimpleNamespace(
        dataset_num_proc=None, max_length=case["max_length"], truncation_mode=case["truncation_mode"] or "keep_start",
        assistant_only_loss=False, dataset_text_field="text", shuffle_dataset=False)
    data = datasets.Dataset.from_list(rows)
    match case["objective"]:
        case "dpo":
            return trl.DPOTrainer._prepare_dataset(trainer, data, tokenizer, options, "train")
        case "kto":
            return trl.KTOTrainer._prepare_dataset(trainer, data, tokenizer, options, "train")
        case "sft":
            return trl.SFTTrainer._prepare_dataset(trainer, data, tokenizer, options, False, None, "train")


def unpadded(ids: list[int], attention: list[int], mask: list[int]) -> dict:
    """A sequence of a batch; padding is at its right and is not scored."""
    length = sum(attention)
    assert attention == [1] * length + [0] * (len(ids) - length) and not any(mask[length:])
    return {"ids": ids[:length], "completion_mask": mask[:length]}


def collated(case: dict, rows: list[dict], pad: int) -> list[dict]:
    """The batch's sequences, those of a pair one after the other."""
    if not rows:
        return []
    if case["objective"] == "sft":
        keep = ("input_ids", "labels")
        batch = DataCollatorForLanguageModeling(pad_token_id=pad)([{key: row[key] for key in keep} for row in rows])
        batch = {key: tensor.tolist() for key, tensor in batch.items()}
        masks = [[int(label != -100) for label in labels] for labels in batch["labels"]]
        return [unpadded(*parts) for parts in zip(batch["input_ids"], batch["attention_mask"], masks)]
    if case["objective"] == "kto":
        batch = DataCollatorForUnpairedPreference(pad_token_id=pad, max_length=case["max_length"])(rows)
    else:
        mode = case["truncation_mode"] or "keep_start"
        batch = DataCollatorForPreference(pad_token_id=pad, max_length=case["max_length"], truncation_mode=mode)(rows)
    batch = {key: tensor.tolist() for key, tensor in batch.items()}
    sequences = [unpadded(*parts) for parts in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])]
    if case["objective"] == "kto":
        return [{**sequence, "label": label} for sequence, label in zip(sequences, batch["label"])]
    return [sequence for pair in zip(sequences[: len(rows)], sequences[len(rows) :]) for sequence in pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    results = []
    for case in cases():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=TOKENIZERS[case["tokenizer"]], bos_token=BOS, eos_token=EOS, chat_template=case["template"])
        rows = prepared(case, tokenizer).to_list()
        case["sequences"] = collated(case, rows, tokenizer.convert_tokens_to_ids(EOS))
        del case["extract"]
        results.append(case)
        print(f"{case['name']}: {len(rows)} rows")
    ids = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
           {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]}]
    of_ids = {"objective": "dpo", "max_length": None, "truncation_mode": None}
    write_json(args.out, {
        "trl": trl.__version__,
        "tokenizers": {name: json.loads(tokenizer.to_str()) for name, tokenizer in TOKENIZERS.items()},
        "cases": results,
        "ids": {"rows": ids, "sequences": collated(of_ids, ids, 0)},
    })


if __name__ == "__main__":
    main()
