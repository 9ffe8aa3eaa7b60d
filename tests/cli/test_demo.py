import pytest

from bitlm.cli import demo


def test_a_reduced_demo(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 4)
    monkeypatch.setattr(demo, "VARIANTS", (demo.VARIANTS[0], demo.VARIANTS[-1]))
    result = run("demo", "--out", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    for words in ("dense", "binary, 1 plane, data-free", "preset chat", "KL to dense", "tokens/s",
                  demo.PROMPT):
        assert words in result.stdout
    assert (tmp_path / "kept" / "chat" / "model.safetensors").is_file()
    assert (tmp_path / "kept" / "dense" / "config.json").is_file()


def test_more_planes_are_nearer(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 2048)
    monkeypatch.setattr(demo, "TIMED_TOKENS", 4)
    variants = (demo.VARIANTS[1], demo.VARIANTS[-1])
    dense, binary, chat = demo.run(tmp_path, lambda done, total: None, variants)
    assert dense.kl is None and dense.packed_bits == dense.file_bits
    assert chat.kl < binary.kl and chat.perplexity < binary.perplexity
    assert binary.packed_bits < binary.file_bits < dense.file_bits
    assert binary.size < chat.size < dense.size


def test_an_existing_folder_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "choose another folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json",
                                  "heldout.txt", "calibration.txt"])
def test_the_data_ships_with_the_package(name):
    assert demo._data(name).is_file()
