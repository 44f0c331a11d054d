"""One YAML plus overrides: what is accepted, and what is refused with which words."""

import pytest

from ssr_rec.config import RunConfig, dump_config, load_config


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


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="No such file or directory; name a config file"):
        load_config(tmp_path / "nowhere.yaml")


def test_shipped_configs_are_valid():
    from pathlib import Path

    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert len(paths) >= 8
    for path in paths:
        load_config(path)
