"""
Weights for mamba.py, which imports this file where it lies beside it: by names on Hugging Face, in
the layouts of mamba_ssm and of transformers, .bin and .safetensors, and checkpoints of train.py.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

# options that mamba_ssm does not know, or not in all of its versions or layers, and what it has
# instead
UNKNOWN = {"norm_eps": 1e-5, "dropout": 0.0, "scan": "auto", "d_intermediate": 0,
           "mixer_rms_eps": 0.0, "bias": False, "dt_limit": (0.0, math.inf), "mimo_rank": 1}
# options of the model, and those of each kind of layer, which mamba_ssm keeps under "ssm_cfg"
OF_MODEL = {"vocab_size", "d_model", "n_layer", "dropout", "norm_eps", "tie_embeddings",
            "pad_vocab_size_multiple", "d_intermediate", "scan", "residual_in_fp32",
            "mixer_rms_eps"}
OF_ALL = {"d_state", "expand", "dt_min", "dt_max", "dt_init_floor", "bias"}
WITH_HEADS = OF_ALL | {"headdim", "ngroups", "chunk_size", "dt_limit"}
OF_LAYER = {"mamba": OF_ALL | {"d_conv", "conv_bias", "dt_rank"},
            "mamba2": WITH_HEADS | {"d_conv", "conv_bias", "A_init_range", "rmsnorm",
                                    "norm_before_gate"},
            "mamba3": WITH_HEADS | {"mimo_rank", "rope_fraction", "A_floor"}}
# all fields of MambaConfig, and of the classes that have more
OPTIONS = {"mamba": OF_MODEL | OF_LAYER["mamba"] | {"layer"}}
OPTIONS["mamba2"] = OPTIONS["mamba"] | OF_LAYER["mamba2"]
OPTIONS["mamba3"] = OPTIONS["mamba2"] | OF_LAYER["mamba3"]
# the names of layers in mamba_ssm, and ours, which mamba.py alone writes; and what else there may
# be under "ssm_cfg"
LAYERS = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3",
          **{layer: layer for layer in OF_LAYER}}
NO_MATTER = {"layer", "dt_init", "dt_scale", "use_fast_path", "use_mem_eff_path", "is_mimo",
             "is_outproj_norm", "d_ssm", "D_has_hdim", "conv_init"}
# the types of those that are not numbers
NO_NUMBERS = {"conv_bias": (bool,), "bias": (bool,), "tie_embeddings": (bool,), "layer": (str,),
              "residual_in_fp32": (bool,), "scan": (str,), "dt_rank": (int, str),
              "rmsnorm": (bool,), "norm_before_gate": (bool,)}
PAIRS = ("A_init_range", "dt_limit")    # of two numbers
# the names of options in transformers, where they are not ours, and ours
TRANSFORMERS = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layer", "state_size": "d_state",
    "conv_kernel": "d_conv", "time_step_rank": "dt_rank", "time_step_min": "dt_min",
    "time_step_max": "dt_max", "time_step_floor": "dt_init_floor", "use_conv_bias": "conv_bias",
    "use_bias": "bias", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings",
    "head_dim": "headdim", "n_groups": "ngroups", "time_step_limit": "dt_limit"}
# its types of models, and what is meant there by options that a config.json leaves out
MODEL_TYPES = {"mamba": {"layer": "mamba", "mixer_rms_eps": 0.0},
               "falcon_mamba": {"layer": "mamba", "mixer_rms_eps": 1e-6},
               "mamba2": {"layer": "mamba2", "ngroups": 8, "tie_embeddings": False}}
# what a config.json may ask for, and the answers that this model has
SUPPORTED = {"model_type": [*MODEL_TYPES], "hidden_act": ["silu"], "rms_norm": [True],
             "attn_layer_idx": [[]], "layer": [*LAYERS], "is_outproj_norm": [False], "d_ssm": [],
             "D_has_hdim": [False], "conv_init": []}
WEIGHTS = ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin.index.json")
RUN = ("best.pt", "ckpt.pt", "ckpt.prev.pt")    # of train.py; the first that is there is read
TENSOR = {"dtype", "shape", "data_offsets"}     # what the header of a .safetensors says of each
DOS_FOLDER = 0x10       # the bit of a zip file's "external attributes" by which a part is a folder
ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")     # a name on Hugging Face: owner/model
TABLES = ("backbone.embedding.weight", "lm_head.weight")        # with a row for each token
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# whose tokenizer released weights have, and how many rows they may have for its tokens
NEOX, NEOX_TOKENS, NEOX_PADDED = "EleutherAI/gpt-neox-20b", 50277, 50432
LLAMA_TOKENS = 128256       # of mamba3-*, which come without that tokenizer


def read(name_or_folder: str | Path, cache_dir=None) -> tuple:
    """
    The options of a model's MambaConfig, a dict, and tensors(model, device, dtype), an iterator
    over the (key, tensor) of such a model, on this device and in this dtype, or the file's.
    ValueError: not such a model, or damaged.  OSError: not found, or no download; see hub_file.
    """
    name = os.fspath(name_or_folder)
    if path := checkpoint_of(name):
        with blame(path):
            saved = mapped(path)
            options, paths = checked(saved["model_config"]), [path]
            tokenizer = saved.get("meta", {}).get("tokenizer")
    else:
        path = hub_file(name, "config.json", cache_dir)
        options, paths = read_options(path), weight_files(name, cache_dir)
        tokenizer = read_tokenizer(name) if Path(name, "tokenizer.json").is_file() else None
    n_layer, found = options.get("n_layer", 0), 0
    if n_layer > 100:       # a model of so many takes a while to make: first a look at the weights
        for file in paths:
            with blame(file):
                found += sum(key.endswith(".mixer.D") for key in open_weights(file)[1])
        if found != n_layer:
            raise ValueError(f"{path}: n_layer is {n_layer}, but the weights have {found} layers")
    up = -options.get("d_intermediate", 0) % 128    # mamba_ssm makes it a multiple of 128
    if up and width_of_mlp(paths) == options["d_intermediate"] + up:
        options["d_intermediate"] += up
    return options, lambda *wanted: fitting(name, paths, tokenizer, *wanted)


def width_of_mlp(paths):
    """The width of the first layer's MLP in the files of some weights, or None."""
    for path in paths:
        with blame(path):
            tensor_of, keys = open_weights(path)
            if "backbone.layers.0.mlp.fc2.weight" in keys:
                return tensor_of("backbone.layers.0.mlp.fc2.weight").shape[1]
    return None


def mapped(path):
    """What torch.save wrote, tensors and plain values alone, mapped to memory."""
    return torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)


def read_whole(path: str | Path, device="cpu"):
    """What torch.save wrote, in memory, after a look at the checksums."""
    check_zip(path)
    return torch.load(path, map_location=device, weights_only=True)


def read_tokenizer(name_or_folder: str | Path, cache_dir=None) -> dict:
    """
    The tokenizer of a model, as the dict that load_tokenizer of tokens.py takes: of a run, of
    the tokenizer.json beside weights, or GPT-NeoX's for released weights that come without one.
    ValueError: damaged.  OSError: not found, or no download; see hub_file.
    """
    name = os.fspath(name_or_folder)
    path = checkpoint_of(name) or tokenizer_file(name, cache_dir)
    with blame(path):
        if path.suffix == ".pt":
            saved = mapped(path)["meta"]["tokenizer"]
            if not isinstance(saved[{"char": "chars", "bpe": "json"}[saved["type"]]], str):
                raise ValueError("its tokenizer is not a text")
            return saved
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        vocab = content["model"].get("vocab")
        if isinstance(vocab, dict) and content == of_characters(chars := "".join(vocab)):
            return {"type": "char", "chars": chars}
        return {"type": "bpe", "json": text}


def check_usable(model, tokenizer, name):
    """ValueError: from_pretrained has loaded what no text can be written or learned with: a weight
    that is not a finite number, or a tokenizer (None: any) with more tokens than the model knows.
    """
    known = model.config.vocab_size
    if tokenizer and tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer of {name} has {tokenizer.vocab_size:,} tokens, and the "
                         f"weights know {known:,}: put their own tokenizer.json beside them")
    for key, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} of {name} has values that are not finite numbers: the file is "
                             "damaged, or of a training that diverged")


def write(folder: Path, options: dict, weights: dict, layout="mamba_ssm", tokenizer=None) -> None:
    """
    Writes config.json and weights into a folder, all of it or nothing: by layout pytorch_model.bin
    of "mamba_ssm" or model.safetensors of "transformers"; and beside them the tokenizer, if given.
    options: of MambaConfig, a dict.  weights: the state_dict of the model.  tokenizer: as of
    read_tokenizer.
    ValueError: the layout has no place for this model.
    OSError: the disk is full, or the folder holds weights that others would read instead.
    """
    if layout not in ("mamba_ssm", "transformers"):
        raise ValueError(f"layout must be 'mamba_ssm' or 'transformers', not {layout!r}")
    check_plain(options, weights)
    config, weights = as_mamba_ssm(options, weights)
    file, save, texts = "pytorch_model.bin", torch.save, {}
    if layout == "transformers":
        from safetensors.torch import save_file

        from mamba_export import as_transformers  # only here: it imports mamba.py
        file, save = "model.safetensors", lambda *args: save_file(*args, {"format": "pt"})
        config, weights = as_transformers(options, weights)
    if tokenizer:
        from mamba_export import tokenizer_files  # as above
        texts = tokenizer_files(tokenizer, options["vocab_size"])
    if other := [name for name in WEIGHTS if name != file and (folder / name).exists()]:
        raise FileExistsError(f"{folder} holds {other[0]}, which others would read; "
                              "choose another folder")
    write_files(folder, {file: lambda path: save(weights, path),
                         "config.json": json.dumps(config, indent=2) + "\n", **texts})


def write_files(folder, contents):
    """Makes files in a folder, all of them or none. contents: {name: its text, or a function that
    writes it to the path that it is given}.  OSError: the disk is full, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, content in contents.items():
            path = Path(unfinished, name)
            path.touch()
            mode = path.stat().st_mode      # safetensors would keep a file from all other persons
            try:
                if isinstance(content, str):
                    path.write_text(content, encoding="utf-8")
                else:
                    content(path)
            except OSError:
                raise
            except Exception as error:      # what torch and safetensors make of an OSError
                raise OSError(f"could not write {folder / name}: {error}") from error
            path.chmod(mode)
        made = list(Path(unfinished).iterdir())     # a large ONNX model has a second file
        for path in made:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        for path in made:
            os.replace(path, folder / path.name)


def as_mamba_ssm(options, weights):
    """The config.json and weights of mamba_ssm, on the CPU. It refuses options that it does not
    know: they are left out where they are as it has them."""
    layer = options["layer"]
    needed = {key: value for key, value in options.items()
              if key not in UNKNOWN or value != UNKNOWN[key]}
    config = {key: value for key, value in needed.items() if key in OF_MODEL}
    ssm_cfg = {key: value for key, value in needed.items() if key in OF_LAYER[layer]}
    if layer != "mamba":
        ssm_cfg["layer"] = layer.capitalize()
    if layer == "mamba3":
        ssm_cfg["is_mimo"] = options["mimo_rank"] > 1
    config.update(ssm_cfg=ssm_cfg, rms_norm=True, fused_add_norm=True)
    weights = {key: tensor.cpu() for key, tensor in weights.items()}
    if options["tie_embeddings"]:       # one tensor in the file, wherever the model is
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    return config, weights


def check_plain(options, weights):
    """ValueError: weights are not those of a Mamba with these options, as a reader will expect."""
    if torch.int8 in {tensor.dtype for tensor in weights.values()}:
        raise ValueError("the layouts of released weights have no int8; save it before that")
    from mamba import Mamba, MambaConfig  # only here: mamba.py imports this file
    with torch.device("meta"):
        keys = Mamba(MambaConfig(**options)).state_dict().keys()
    if odd := min(keys ^ weights.keys(), default=None):
        raise ValueError(f"the model {'lacks' if odd in keys else 'has'} {odd}: to be saved it "
                         "must have the modules that mamba.py made, with adapters merged")
    table, head = (weights[key] for key in TABLES)
    same = head.data_ptr() == table.data_ptr() or torch.equal(head, table)  # a nan equals nothing
    if options["tie_embeddings"] and not same:
        raise ValueError("the head is not the embedding: set config.tie_embeddings = False")


def fitting(name, paths, tokenizer, model, device, dtype):
    """Yields (key, tensor) one by one: all that the model needs and nothing else; a head that is
    tied is the embedding. The model keeps the tokenizer, to be saved with it again.
    ValueError: paths, the files of `name`, hold more, less or other."""
    model.tokenizer = tokenizer
    missing = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied, tables = model.config.tie_embeddings, {}
    for path in paths:
        for key, tensor in read_weights(path, tied):
            shape = missing.pop(key, None)
            if tuple(tensor.shape) != shape:
                expected = f"{shape}" if shape else "this model does not have it"
                raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, and by its config.json "
                                 f"{expected}")
            kind = dtype or tensor.dtype
            if key.endswith((".A_log", ".D", ".dt_proj.bias", ".dt_bias")):     # as in Mixer._apply
                kind = torch.promote_types(kind, torch.float32)
            tensor = tensor.to(device, kind, copy=True)
            tables.update({key: tensor} if key in TABLES else {})
            yield key, tensor
    if tied and TABLES[0] in tables:
        missing.pop(TABLES[1], None)
        yield TABLES[1], tables[TABLES[0]]
    if missing:
        some = ", ".join([*missing][:3]) + ", ..." * (len(missing) > 3)
        raise ValueError(f"{name} lacks {len(missing)} of this model's tensors: {some}")


def read_options(path):
    """The options of MambaConfig in a config.json, a dict. ValueError: not of such a model."""
    with blame(path):
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {**saved, **(saved.get("ssm_cfg") or {})}
        for key, answers in SUPPORTED.items():
            if found.get(key) not in (*answers, None):
                able = " or ".join(map(repr, answers)) or "none"
                raise ValueError(f"{key} is {found[key]!r}; this model can only do {able}")
        found = of_transformers(saved) if "hidden_size" in saved else of_mamba_ssm(saved)
        if missing := {"vocab_size", "d_model", "n_layer"} - found.keys():
            raise ValueError(f"not the config of a Mamba: it has no {', '.join(sorted(missing))}")
        found.setdefault("residual_in_fp32", True)      # so they were trained
        known = OF_MODEL | OF_LAYER[found["layer"]] | {"layer"}
        return checked({key: found[key] for key in known & found.keys()})


def of_mamba_ssm(saved):
    """What mamba_ssm keeps in a config.json, by our names, and more."""
    ssm_cfg = saved.get("ssm_cfg") or {}
    found = {**saved, **ssm_cfg}
    layer = found["layer"] = LAYERS[found.get("layer") or "Mamba1"]
    if unknown := ssm_cfg.keys() - OF_LAYER[layer] - NO_MATTER:
        raise ValueError(f"this model does not know the option {unknown.pop()} in ssm_cfg")
    if layer == "mamba3" and ssm_cfg:       # there SISO has a mimo_rank that is not used
        found["mimo_rank"] = found.get("mimo_rank", 4) if found.get("is_mimo") else 1
        if found.get("is_mimo") and found["mimo_rank"] == 1:
            raise ValueError("is_mimo is True and mimo_rank 1, which this model cannot do")
    return found


def of_transformers(saved):
    """The same of a config.json of transformers."""
    found = {TRANSFORMERS.get(key, key): value for key, value in saved.items()}
    found = {**MODEL_TYPES[saved.get("model_type") or "mamba"], **found}
    found["pad_vocab_size_multiple"] = 1    # a row for each token and no more
    if found["layer"] == "mamba2":
        # infinity is {"__float__": "Infinity"} in newer versions
        found["dt_limit"] = [float(n["__float__"]) if isinstance(n, dict) else n
                             for n in found.get("dt_limit", (0.0, math.inf))]
        # theirs suits a GPU; here it changes the speed alone
        found["chunk_size"] = min(found.get("chunk_size", 64), 64)
    elif "intermediate_size" in found:      # this counts, whatever its expand is
        found["expand"], rest = divmod(found["intermediate_size"], found["d_model"])
        if rest:
            raise ValueError("intermediate_size is not a multiple of hidden_size")
    return found


def checked(options):
    """The same dict. ValueError: an option of another type than it has, or of an absurd size."""
    layer = options.get("layer", "mamba")
    for key, value in options.items():
        if key not in OPTIONS.get(layer, {"layer"}):
            raise ValueError(f"this model does not know the option {key}")
        if key in PAIRS:
            if type(value) not in (list, tuple) or len(value) != 2:
                raise ValueError(f"{key} is {value!r:.40}, and not two numbers")
            options[key] = tuple(float(number) for number in value)
            continue
        if type(value) not in NO_NUMBERS.get(key, (int, float)):
            raise ValueError(f"{key} is {value!r:.40}, of the wrong type")
        if type(value) is not str and not abs(value) < 2 ** 63:     # nan is not below it either
            raise ValueError(f"{key} is {value!r:.40}, and no memory could hold such a model")
    width, inner = options.get("d_model", 1), options.get("d_model", 1) * options.get("expand", 2)
    state = options.get("d_state", 1) * options.get("mimo_rank", 1)
    sides = [width * options.get("vocab_size", 1), width * inner, inner * state,
             inner * options.get("d_conv", 1), width * state * options.get("ngroups", 1)]
    if max(sides) > 2 ** 50:
        raise ValueError("no memory could hold a model of these sizes")
    return options


def checkpoint_of(name):
    """The path of a checkpoint of train.py: name itself, or in the folder of a run; or None."""
    released = Path(name, "config.json").exists()
    paths = [Path(name), *(Path(name, file) for file in RUN if not released)]
    return next((path for path in paths if path.suffix == ".pt" and path.is_file()), None)


def weight_files(name, cache_dir=None):
    """The paths of a model's weights. Those on this machine, of several kinds the newest; if there
    are none, those that it has on Hugging Face, downloaded."""
    found = []
    for local, file in itertools.product((True, False), WEIGHTS):
        if local or not found:
            with contextlib.suppress(FileNotFoundError):    # a model has one of WEIGHTS
                found.append(hub_file(name, file, cache_dir, local))
    if not found:
        raise FileNotFoundError(f"{name} has no weights: none of {', '.join(WEIGHTS)}")
    path = max(found, key=lambda path: path.stat().st_mtime)
    if path.suffix != ".json":
        return [path]
    with blame(path):       # the index of weights in several files: {"weight_map": {key: file}}
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    return [hub_file(name, file, cache_dir) for file in files]


def read_weights(path, tied):
    """Yields (key, tensor) one by one, by the keys of mamba.py, but not a head that is tied."""
    with blame(path):
        check(path)
        (tensor_of, keys), in_memory = open_weights(path), 0
        for key in keys:
            # what was read of a mapping stays in memory as long as it: begin another one
            if in_memory > 2 ** 27:
                tensor_of, in_memory = open_weights(path)[0], 0
            tensor = tensor_of(key)
            plain = tensor.dtype in DTYPES and tensor.layout == torch.strided
            if not plain or tensor.is_meta:
                raise ValueError(f"{key} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
            if tensor.untyped_storage().nbytes() < tensor.nbytes:   # few numbers, expanded to many
                raise ValueError(f"{key} is {tuple(tensor.shape)}, but not all of it is there")
            if tied and key == "lm_head.weight":
                embedding = tensor_of(next(k for k in keys if k.startswith("backbone.embedding")))
                if tensor.data_ptr() != embedding.data_ptr() and not torch.equal(tensor, embedding):
                    raise ValueError("lm_head.weight is not the embedding, as config.json says")
                continue
            in_memory += tensor.nbytes
            yield key.replace("backbone.embeddings.", "backbone.embedding."), tensor


def open_weights(path):
    """(a function of a key that gives its tensor, all keys), of a file that is mapped to memory."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        file = safe_open(path, framework="pt")
        return file.get_tensor, list(file.keys())
    weights = mapped(path)
    weights = weights["model"] if path.suffix == ".pt" else weights
    return weights.__getitem__, list(weights)


def check(path):
    """ValueError: what the libraries pass over: a wrong checksum, odd keys in a header."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            header = file.read(min(10 ** 8, int.from_bytes(file.read(8), "little")))
        entries = json.loads(header, object_pairs_hook=list)    # (key, value), each that there is
        tensors = [{key for key, _ in entry} for name, entry in entries if name != "__metadata__"]
        if len(dict(entries)) < len(entries) or any(keys != TENSOR for keys in tensors):
            raise ValueError("its header has odd keys, or one twice")
    elif not zipfile.is_zipfile(path):
        raise ValueError("not the zip file that torch.save writes since PyTorch 1.6")
    else:
        check_zip(path)


def check_zip(path):
    """ValueError or BadZipFile: torch.load, which looks at no checksum, might give other numbers
    than those that torch.save has put into this file, or need hours."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > os.path.getsize(path):
            raise ValueError("it holds more than its size")     # hours to unpack, perhaps
        for part in parts:
            # PyTorch fills nothing in for a part that is marked as a folder, so that its tensor is
            # whatever was in memory. It maps a compressed one as it is.
            if part.file_size > 0 and part.external_attr & DOS_FOLDER:
                raise ValueError(f"a part is marked as a folder: {part.filename}")
            if part.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"a part is compressed: {part.filename}")
            try:
                # The entry itself, not its name as testzip: another one may have the same.
                with archive.open(part) as file:
                    while file.read(2 ** 20):   # to the end, where zipfile looks at the checksum;
                        pass                    # 500 MB take 0.25 s
            except (OSError, zipfile.BadZipFile) as error:  # the first where a wrong offset leads
                raise ValueError(f"a part is damaged: {error}") from None


@contextlib.contextmanager
def blame(path):
    """Whatever is raised while a file is read becomes a ValueError of one line about that file."""
    try:
        yield
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 (what is damaged may fail in any way)
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = kind + (str(error).strip() or "unreadable").split("\n")[0][:200]
        if "weights_only" in str(error):    # torch would say how to load it all the same
            reason = "it holds something else than tensors"
        raise ValueError(f"{path} is damaged, or not of a Mamba ({reason}); if it was downloaded, "
                         "delete it, and the same command downloads it again") from None


def tokenizer_file(name, cache_dir):
    """The path of the tokenizer.json beside the weights, or of GPT-NeoX's."""
    # Those of state-spaces come without, or with GPT-NeoX's: do not ask the network each time.
    local = name.startswith("state-spaces/")
    try:
        return hub_file(name, "tokenizer.json", cache_dir, local)
    except FileNotFoundError:
        tokens = read_options(hub_file(name, "config.json", cache_dir))["vocab_size"]
        is_folder = os.path.isdir(name)
        if tokens > NEOX_PADDED or (is_folder and tokens < NEOX_TOKENS):
            where = "there" if is_folder else "beside them, in a folder, and give its name"
            llama = ", Llama-3.1's," if tokens == LLAMA_TOKENS else ""
            raise FileNotFoundError(
                f"{name} has no tokenizer.json, and its vocabulary of {tokens:,} is not GPT-NeoX's:"
                f" put that of these weights{llama} {where} (python sample.py --out_dir=<run> "
                "--export=<folder> writes both), or train them with --new_vocabulary") from None
    except ConnectionError as error:
        print(f"whether {name} has a tokenizer of its own is not known ({error}); taking "
              "GPT-NeoX's", file=sys.stderr)
    return hub_file(NEOX, "tokenizer.json", cache_dir)


def of_characters(chars):
    """The tokenizer.json in which each character is a token, as a dict."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
                          "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        # <unk> is not in it: a character outside the alphabet is an error
        "model": {"type": "WordLevel", "unk_token": "<unk>",
                  "vocab": {character: i for i, character in enumerate(chars)}}}


def hub_file(name, file, cache_dir=None, local=False):
    """
    The path of a file of a model. name: a folder, or a name on Hugging Face, such as
    state-spaces/mamba-130m; then the file is in Hugging Face's cache, or in cache_dir, into which
    it is downloaded unless local.
    FileNotFoundError: none there.  PermissionError: it needs a login.  ConnectionError: no network.
    """
    if Path(file).name != file:     # the index of some shards may say anything
        raise ValueError(f"{name}: '{file}' is not the name of a file")
    if os.path.exists(name) or not ON_HUB.fullmatch(name):
        path = Path(name, file)
        if not os.path.isdir(name):
            raise FileNotFoundError(f"there is no folder {name}, and a name on Hugging Face is "
                                    "like state-spaces/mamba-130m")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        return path
    import huggingface_hub as hub
    from huggingface_hub import errors
    where, cache_dir = f"{file} of {name}", cache_dir or None
    path = hub.try_to_load_from_cache(name, file, cache_dir)
    if isinstance(path, str):       # else None, or a mark that the model is known not to have it
        return Path(path)
    if local:
        raise FileNotFoundError(f"{where} is not on this machine")
    try:
        return Path(hub.hf_hub_download(name, file, cache_dir=cache_dir))
    except errors.LocalEntryNotFoundError:
        raise ConnectionError(f"{where} is not on this machine, and Hugging Face cannot be "
                              "reached: is there a network, or is HF_HUB_OFFLINE set? Without one "
                              "give a folder with the files, or by --cache_dir or HF_HOME a cache "
                              "that has them") from None
    except errors.RepositoryNotFoundError:      # also what is said of one that needs a login
        raise PermissionError(f"{where}: Hugging Face has no such model, or it needs a login "
                              "(HF_TOKEN)") from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"Hugging Face has no {where}") from None
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise PermissionError(f"{where}: Hugging Face wants a login (HF_TOKEN)") from None
