import pytest


def test_greedy_text_to_stdout_and_speed_to_stderr(run, zoo):
    first, again = (run("generate", zoo / "packed", "-p", "The quick", "--max-new-tokens", 6)
                    for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("The quick")
    assert first.stdout == again.stdout
    assert "tokens/s" in first.stderr


def test_the_activations_are_chosen_and_said(run, zoo):
    arguments = ("generate", zoo / "packed", "-p", "The", "--max-new-tokens", 2)
    assert "activations float" in run(*arguments).stderr
    result = run(*arguments, "--activation", "int16")
    assert result.exit_code == 0 and "activations int16" in result.stderr
    assert "activations" not in run("generate", zoo / "llama", *arguments[2:]).stderr
    for model, mode, code, words in (("packed", "int3", 2, "activation is 'int3'"),
                                     ("llama", "int8", 1, "has no packed weight")):
        result = run("generate", zoo / model, *arguments[2:], "--activation", mode)
        assert result.exit_code == code
        assert words in result.stderr and result.stderr.count("\n") == 1


def test_sampling_follows_the_seed(run, zoo):
    texts = [run("generate", zoo / "llama", "-p", "The", "--max-new-tokens", 12, "--temperature", 2,
                 "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_default_length_stays_within_the_context(run, zoo):
    result = run("generate", zoo / "llama", "-p", "x" * 120)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("model, options, code, words", [
    ("bert", ["-p", "x"], 1, "does not generate text"),
    ("missing/folder", ["-p", "x"], 1, "does not exist"),
    ("llama", [], 2, "prompt"),
    ("llama", ["-p", ""], 2, "prompt is empty"),
    ("llama", ["-p", "x", "--max-new-tokens", "1000"], 1, "do not fit"),
    ("llama", ["-p", "x" * 200], 1, "do not fit"),
    ("llama", ["-p", "x", "--device", "cuda:77"], 1, "no device 'cuda:77' here"),
])
def test_what_is_refused(run, zoo, model, options, code, words):
    result = run("generate", zoo / model, *options)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output
