"""One YAML plus overrides: what is accepted, and what is refused with which words."""

import errno
from typing import get_args

import pytest
from pydantic import BaseModel

from ssr_rec.common.errors import UserError
from ssr_rec.common.paths import place
from ssr_rec.config.help import config_help
from ssr_rec.config.run import RunConfig, dump_config, load_config
from ssr_rec.over_archs.choice import OverArchConfig
from ssr_rec.over_archs.settings import MLPConfig
from ssr_rec.runs.exit_codes import exit_code_of


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_file_and_overrides_in_this_order(tmp_path):
    path = write(tmp_path, "train: {batch_size: 512, epochs: 3}\nover_arch: {name: mlp, hidden: [8]}\n")
    config = load_config(path, ["--train.epochs=5", "--over_arch.hidden=[4, 4]", "--train.epochs=7"])
    assert (config.train.batch_size, config.train.epochs, config.over_arch.hidden) == (512, 7, [4, 4])
    assert config.embeddings == RunConfig().embeddings
    assert load_config(None) == RunConfig()


def test_resolved_config_repeats_the_run(tmp_path):
    config = load_config(None, ["--over_arch.filter=dynamic", "--over_arch.alpha_init=-0.5", "--train.patience=2"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("number", ["1e-3", "1E-3", ".001", "1.0e-3", "0.001"])
def test_numbers_as_people_write_them(tmp_path, number):
    assert load_config(write(tmp_path, f"optimizer: {{learning_rate: {number}}}")).optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {batchsize: 3}", [], "unknown key 'train.batchsize'; did you mean 'batch_size'?"),
        ("trian: {}", [], "unknown key 'trian'; did you mean 'train'?"),
        ("", ["--over_arch.num_view=3"], "unknown key 'over_arch.ssr.num_view'; did you mean 'num_views'?"),
        (
            "over_arch: {name: mlp, num_views: 3}",
            [],
            "unknown key 'over_arch.mlp.num_views'; valid keys: name, compile, hidden",
        ),
        ("data: {synthetic: {zzz: 3}}", [], "unknown key 'data.synthetic.zzz'; valid keys: seed, train_rows"),
        ("over_arch: {name: transformer}", [], "over_arch"),
        ("train: {batch_size: '3'}", [], "train.batch_size: Input should be a valid integer (got '3')"),
        ("train: {batch_size: 0}", [], "train.batch_size"),
        ("train: {batch_size: 1.5}", [], "train.batch_size"),
        ("train: {bf16: yes please}", [], "train.bf16"),
        ("optimizer: {learning_rate: .nan}", [], "optimizer.learning_rate"),
        ("seed: -1", [], "seed"),
        ("- a\n- b", [], "must be a mapping of keys to values, not list"),
        ("a: [", [], "not YAML"),
        ("!!python/object/apply:os.system ['true']", [], "not YAML"),
        ("", ["--train.epochs", "5"], "argument '--train.epochs' is not understood"),
        ("", ["train.epochs=5"], "overrides look like --train.batch_size=512"),
        ("", ["--train.epochs=[5"], "the value is not YAML"),
        ("seed: 1", ["--seed.a=1"], "'seed' is a value, not a section"),
    ],
)
def test_refusals_name_the_key_and_the_fix(tmp_path, text, overrides, message):
    with pytest.raises(ValueError) as refusal:
        load_config(write(tmp_path, text), overrides)
    assert message in str(refusal.value)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_a_decay_that_would_do_nothing_is_refused(optimizer):
    with pytest.raises(UserError, match=f"weight_decay=0.1: FBGEMM's {optimizer} has none"):
        load_config(None, [f"--embeddings.optimizer={optimizer}", "--embeddings.weight_decay=0.1"])
    assert load_config(None, [f"--embeddings.optimizer={optimizer}"]).embeddings.weight_decay == 0


def test_the_two_adams_have_two_names():
    for name, fused, halves in (("adam", False, [False, False]), ("lazy_adam", True, [False, True])):
        config = load_config(None, [f"--embeddings.optimizer={name}"]).embeddings
        assert config.is_fused is fused and [config.takes_halves(device) for device in ("cpu", "cuda")] == halves


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory; name a config file"):
        load_config(tmp_path / "nowhere.yaml")


def test_shipped_configs_are_valid():
    from pathlib import Path

    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert len(paths) >= 8
    for path in paths:
        load_config(path)


@pytest.mark.parametrize("text", ["/data/log #2", "#1", "20240506", "2024-05-06", "on", "1e5", "a: b", "[x]"])
@pytest.mark.parametrize("key", ["data.path", "runs", "warm_start"])
def test_text_is_taken_as_it_is_written(key, text):
    config = load_config(None, [f"--{key}={text}"])
    assert (config.data.path if key == "data.path" else getattr(config, key)) == text
    assert load_config(None, [f"--name={text}"]).name == text if "/" not in text else True


def test_text_that_is_null_can_be_said():
    assert load_config(None, ["--name=null"]).name is None
    assert load_config(None, ['--name="null"']).name == "null"


def test_a_number_for_a_name_in_a_file_is_told_to_be_quoted(tmp_path):
    (tmp_path / "c.yaml").write_text("name: 2024-05-06\n")
    with pytest.raises(ValueError, match=r"name: Input should be a valid string; quote it \(got '2024-05-06'\)"):
        load_config(tmp_path / "c.yaml")


def test_another_over_arch_drops_the_settings_of_the_files_and_says_so(tmp_path, caplog):
    (tmp_path / "c.yaml").write_text("over_arch: {name: ssr, num_views: 3, view_dim: 8}\ntrain: {batch_size: 64}\n")
    config = load_config(tmp_path / "c.yaml", ["--over_arch.name=mlp", "--over_arch.hidden=[8]"])
    assert config.over_arch == MLPConfig(hidden=[8]) and config.train.batch_size == 64
    assert caplog.messages == ["over_arch.name=mlp: dropped the file's settings of ssr: num_views, view_dim"]
    assert load_config(tmp_path / "c.yaml", ["--over_arch.name=ssr"]).over_arch.num_views == 3
    (tmp_path / "unnamed.yaml").write_text("over_arch: {num_views: 3}\n")
    assert load_config(tmp_path / "unnamed.yaml", ["--over_arch.name=mlp"]).over_arch == MLPConfig()
    with pytest.raises(ValueError, match="unknown key"):
        load_config(tmp_path / "c.yaml", ["--over_arch.name=mlp", "--over_arch.num_views=3"])


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:HIDDEN@bucket/x",
        "https://me:HIDDEN@host/log.parquet",
        "https://host/log.parquet?a=1&X-Amz-Signature=HIDDEN",
        "https://host/x?access_token=HIDDEN",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="credentials in a URL would be written") as refused:
        place(url)
    assert "HIDDEN" not in str(refused.value) and "***" in str(refused.value)


def test_help_names_every_key_with_its_type_default_and_meaning():
    text = " ".join(config_help().split())

    def keys(model, prefix):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner, f"{prefix}{name}.")
            elif name != "over_arch":
                yield f"{prefix}{name}", field

    over_archs = [
        (f"over_arch.{k}", f) for m in get_args(get_args(OverArchConfig)[0]) for k, f in m.model_fields.items()
    ]
    found = [*keys(RunConfig, ""), *over_archs]
    assert len(found) > 120
    for key, field in found:
        assert f"--{key} (" in text, key
        if field.description:
            assert " ".join(field.description.split()) in text, key
    assert "--train.batch_size (int, default 1024)" in text
    assert (
        "--embeddings.optimizer (rowwise_adagrad | adagrad | sgd | lazy_adam | adam, default rowwise_adagrad)" in text
    )
    assert "--train.max_steps (int | null, default null)" in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("bad"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (NotADirectoryError(errno.ENOTDIR, "no folder"), 2),
        (OSError(errno.EROFS, "read-only"), 2),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), 1),
        (RuntimeError("anything else"), None),
        (ValueError("raised by a library"), None),
        (KeyboardInterrupt(), 75),
    ],
)
def test_exit_codes_tell_what_to_do(error, code, capsys):
    assert exit_code_of(error) == code
    assert len(capsys.readouterr().err.splitlines()) == (code is not None)
