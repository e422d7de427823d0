#!/usr/bin/env python3
"""Check that sacpo renders chat templates as transformers does.

    cargo build --release
    python scripts/check_chat_templates.py [FOLDER …]

The templates are those of TRL's package (Llama 3, Qwen 2.5 and 3, Gemma, Phi 3 and many others) and every .jinja file of the
folders given. Each is put beside a tokenizer of bytes; conversations of one and several turns, with and without a system
message, with odd white space and other scripts, go through `sacpo data inspect` and through `apply_chat_template`. Prompt and
answered prompt must be equal; what one refuses the other must refuse, and a template that renders the prompt otherwise once it is
answered must be refused with that reason.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SACPO = ROOT / "target/release/sacpo"
BOS, EOS = "<s>", "</s>"

USER = {"role": "user", "content": "Name a prime."}
CONVERSATIONS = {
    "one turn": [USER],
    "two turns": [USER, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "A larger one?"}],
    "system": [{"role": "system", "content": "You are brief."}, USER],
    "system, two turns": [
        {"role": "system", "content": "You are brief."},
        USER,
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Why?"},
    ],
    "white space and scripts": [{"role": "user", "content": "  Zähle auf:\n\n\t一, два <b>&amp;</b> \"x\" \\n {{ y }}  "}],
    "two users in a row": [USER, USER],
}
ANSWER = " Eleven, <i>I</i> think.\n"


def byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))


def ours(folder: Path, messages: list) -> tuple[str, str] | str:
    """Prompt and response, or the message of the error."""
    answer = lambda text: [{"role": "assistant", "content": text}]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": messages, "chosen": answer(ANSWER), "rejected": answer("no")}))
    command = [SACPO, "data", "inspect", rows, "--model", folder, "--template-tail", "keep", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        return done.stderr
    assert done.returncode == 0, done.stderr
    prompt, chosen, _ = json.loads(done.stdout)["rows"][0]["parts"]
    return prompt["text"], chosen["text"]


def theirs(tokenizer: PreTrainedTokenizerFast, messages: list) -> tuple[str, str] | None:
    """Prompt and answered prompt, or nothing if the template refuses them."""
    render = lambda messages, ask: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    try:
        return render(messages, True), render([*messages, {"role": "assistant", "content": ANSWER}], False)
    except Exception:
        return None


def compare(ours: tuple[str, str] | str, theirs: tuple[str, str] | None) -> str:
    """A word on what is the same, or a sentence that starts with "DIFFERENT"."""
    if theirs is None:
        return "both refuse" if isinstance(ours, str) else f"DIFFERENT: only transformers refuses it; sacpo: {ours}"
    prompt, answered = theirs
    if not answered.startswith(prompt):
        # where the prompt is rendered otherwise once it is answered there is no boundary to draw
        same = isinstance(ours, str) and "renders the prompt otherwise" in ours
        return "no boundary" if same else f"DIFFERENT: sacpo should see no boundary: {ours}"
    if isinstance(ours, str):
        return f"DIFFERENT: only sacpo refuses it: {ours}"
    # EOS ends every response, also where the template does not write it
    expected = answered if EOS in answered[len(prompt) :] else answered + EOS
    return "equal" if ours == (prompt, expected[len(prompt) :]) else f"DIFFERENT:\n  {ours}\n  {(prompt, expected)}"


def main() -> None:
    folders = [Path(trl.__file__).parent / "chat_templates", *map(Path, sys.argv[1:])]
    templates = sorted(path for folder in folders for path in folder.glob("*.jinja"))
    counts: dict[str, int] = {}
    for template in templates:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            byte_tokenizer(folder)
            source = template.read_text()
            (folder / "chat_template.jinja").write_text(source)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS, chat_template=source
            )
            results = {
                what: compare(ours(folder, messages), theirs(tokenizer, messages)) for what, messages in CONVERSATIONS.items()
            }
        for what, result in results.items():
            counts[result.split(":")[0]] = counts.get(result.split(":")[0], 0) + 1
            if result.startswith("DIFFERENT"):
                print(f"{template.name}, {what}: {result}")
    print(f"{len(templates)} templates, {len(CONVERSATIONS)} conversations each: {counts}")
    sys.exit(1 if "DIFFERENT" in counts else 0)


if __name__ == "__main__":
    main()
