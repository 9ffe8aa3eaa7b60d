import shutil
import subprocess
import sys

from transformers import AutoTokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def test_piped_lines_without_a_template(run, zoo):
    result = run("chat", zoo / "packed", "--max-new-tokens", 4, "--temperature", 0,
                 input="hello\n/reset\nhello\n/foo\n\n/exit\nnever\n")
    assert result.exit_code == 0, result.output
    assert "no chat template" in result.stderr
    assert "started over" in result.stderr
    assert "unknown command /foo" in result.stderr
    assert result.stdout.count("\n") >= 2


def test_the_activations_are_chosen_and_said(run, zoo):
    result = run("chat", zoo / "packed", "--activation", "int8", "--max-new-tokens", 2, input="a\n")
    assert result.exit_code == 0, result.output
    assert "Activations: int8." in result.stderr
    assert run("chat", zoo / "packed", "--activation", "w8", input="").exit_code == 2


def test_a_template_is_used_and_history_kept(run, zoo, tmp_path, monkeypatch):
    folder = shutil.copytree(zoo / "llama", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    import bitlm.cli.streaming as streaming

    asked = []

    def stream(model, tokenizer, ids, new_tokens, temperature, skip_prompt):
        asked.append(tokenizer.decode(ids[0]))
        writer = streaming.Writer(tokenizer, skip_prompt)
        writer.text = "yes"
        return writer

    monkeypatch.setattr(streaming, "stream", stream)
    result = run("chat", folder, input="one\ntwo\n")
    assert result.exit_code == 0, result.output
    assert asked[0].endswith("[user]one[assistant]")
    assert asked[1].endswith("[user]one[assistant]yes[user]two[assistant]")


def test_a_conversation_that_outgrows_the_context_starts_over(run, zoo):
    result = run("chat", zoo / "llama", "--max-new-tokens", 2, input=f"{'x' * 300}\nhello\n")
    assert result.exit_code == 0, result.output
    assert "the conversation starts over" in result.stderr


def test_an_encoder_is_refused(run, zoo):
    result = run("chat", zoo / "bert", input="")
    assert result.exit_code == 1
    assert "does not generate text" in result.stderr


def test_in_a_process_of_its_own(zoo):
    command = [sys.executable, "-c", "from bitlm.cli import main; main()", "chat",
               str(zoo / "packed"), "--max-new-tokens", "3"]
    done = subprocess.run(command, input="hello\n", text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
