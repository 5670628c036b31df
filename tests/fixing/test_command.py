from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from setpoint.cli import app, main
from setpoint.testing.tiny import tiny

run = CliRunner().invoke


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder with a tiny GPT-2 and a tokenizer that knows letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model, _ = tiny("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    letters = {letter: index for index, letter in enumerate("?abcdefghijklmnopqrstuvwxyz .,")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_fixed_folder_is_checked_like_any_model(gpt2: Path, tmp_path: Path) -> None:
    done = run(app, ["fix", str(gpt2), "--with", "pre-rmsnorm", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["fixes"] == ["pre-rmsnorm"]
    assert said["change"]["exact"][0] < 1e-9
    assert said["change"]["perplexity"][0] == pytest.approx(said["change"]["perplexity"][1], rel=1e-4)
    assert run(app, ["check", str(tmp_path / "out"), "--json"]).exit_code == 0


def test_the_statement_is_printed_in_words(gpt2: Path, tmp_path: Path) -> None:
    done = run(app, ["fix", str(gpt2), "--with", "pre-rmsnorm", "-o", str(tmp_path / "out")])
    assert "the same: off by" in done.stdout
    assert "perplexity" in done.stdout


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["fix", *words])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    return message


def test_an_unknown_fix_is_one_line_with_the_nearest(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, str(gpt2), "--with", "pre-rsmnorm", "-o", str(tmp_path / "out"))
    assert "pre-rmsnorm" in message
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--force" in refused(capsys, "no-such-model", "--with", "pre-rmsnorm", "-o", str(tmp_path))


def test_a_checkpoint_is_trained_on_given_text_or_taken_untrained_on_purpose(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out", tmp_path / "letters.txt"
    text.write_text("the cat sat on the mat, and the dog. " * 400)
    asked = [str(gpt2), "--with", "lns", "-o", str(out), "--data", str(text)]
    assert "--untrained-ok" in refused(capsys, *asked)
    assert "exclude each other" in refused(capsys, *asked, "--retrain", str(text), "--untrained-ok")
    done = run(app, ["fix", *asked, "--retrain", str(text), "--steps", "30", "--json"])
    assert done.exit_code == 0, done.output
    trained = json.loads(done.stdout)["change"]["perplexity"]
    done = run(app, ["fix", *asked, "--untrained-ok", "--force", "--json"])
    assert done.exit_code == 0, done.output
    untrained = json.loads(done.stdout)
    assert trained[1] < untrained["change"]["perplexity"][1]
    assert "train it before use" in untrained["notes"][0]


def test_training_that_no_fix_asks_for_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(
        capsys, "no-such-model", "--with", "pre-rmsnorm", "-o", str(tmp_path / "out"), "--retrain", "python-stdlib"
    )
    assert "nothing to train for: pre-rmsnorm is exact; leave --retrain out" in message


def test_a_model_trained_with_layernorm_scaling_is_handed_to_transformers(gpt2: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from setpoint import load

    text = tmp_path / "letters.txt"
    text.write_text("the cat sat on the mat, and the dog. " * 400)
    trained, folded = tmp_path / "trained", tmp_path / "folded"
    for asked in (
        [str(gpt2), "--with", "lns", "-o", str(trained), "--retrain", str(text), "--steps", "5"],
        [str(trained), "--with", "lns-fold", "-o", str(folded)],
    ):
        done = run(app, ["fix", *asked, "--data", str(text)])
        assert done.exit_code == 0, done.output
    batch = torch.randint(0, 29, (2, 9))
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folded)(batch).logits
        torch.testing.assert_close(stock, load(trained).model(batch).logits)
