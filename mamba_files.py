"""
Released weights for mamba.py, which imports this file where it lies beside it: names on Hugging
Face, the layouts of mamba_ssm and of transformers, .bin and .safetensors, in one file or several.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

import torch

# what mamba_ssm keeps under "ssm_cfg": options of MambaConfig, and others that change nothing here
OURS = {"d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init_floor", "conv_bias",
        "bias"}
SSM_CFG = OURS | {"layer", "dt_init", "dt_scale", "use_fast_path"}
OPTIONS = OURS | {"vocab_size", "d_model", "n_layer", "dropout", "norm_eps", "tie_embeddings",
                  "pad_vocab_size_multiple", "d_intermediate", "scan"}
# the names of options in transformers, where they are not ours, and ours
TRANSFORMERS = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layer", "state_size": "d_state",
    "conv_kernel": "d_conv", "time_step_rank": "dt_rank", "time_step_min": "dt_min",
    "time_step_max": "dt_max", "time_step_floor": "dt_init_floor", "use_conv_bias": "conv_bias",
    "use_bias": "bias", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tie_embeddings"}
# what a config.json may ask for, and the only answer that this model has
SUPPORTED = {"model_type": "mamba", "hidden_act": "silu", "rms_norm": True, "attn_layer_idx": [],
             "layer": "Mamba1"}
WEIGHTS = ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin.index.json")
ON_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")     # a name on Hugging Face: owner/model
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read(name_or_folder, cache_dir=None):
    """
    The options of a model's MambaConfig, a dict, and tensors(model), an iterator over the (key,
    tensor) that such a model needs, by its own keys.
    ValueError: not such a model, or damaged.  OSError: not found, or no download; see hub_file.
    """
    name = os.fspath(name_or_folder)
    options = read_options(hub_file(name, "config.json", cache_dir))
    return options, lambda model: fitting(model, name, weight_files(name, cache_dir))


def write(folder, config, weights):
    """
    Writes config.json and pytorch_model.bin into a folder, both whole or none.
    OSError: the disk is full, or the folder holds weights that others would read instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if other := [name for name in WEIGHTS[1:] if (folder / name).exists()]:
        raise FileExistsError(f"{folder} holds {other[0]}, which others would read; "
                              "choose another folder")
    text = json.dumps(config, indent=2) + "\n"
    writers = {"pytorch_model.bin": lambda file: torch.save(weights, file),
               "config.json": lambda file: file.write(text.encode())}
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, write_to in writers.items():
            with open(Path(unfinished, name), "wb") as file:
                try:
                    write_to(file)
                except RuntimeError as error:       # torch's way to report a full disk
                    raise OSError(f"could not write {folder / name}: {error}") from None
                file.flush()
                os.fsync(file.fileno())
        for name in writers:
            os.replace(Path(unfinished, name), folder / name)


def fitting(model, name, paths):
    """Yields (key, tensor) one by one: all that the model needs and nothing else, but not the head
    if it is tied. ValueError: paths, the files of the model `name`, hold more, less or other."""
    missing = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tied = model.config.tie_embeddings
    for path in paths:
        for key, tensor in read_weights(path, tied):
            shape = missing.pop(key, None)
            if tuple(tensor.shape) != shape:
                expected = f"{shape}" if shape else "this model does not have it"
                raise ValueError(f"{path}: {key} is {tuple(tensor.shape)}, and by its config.json "
                                 f"{expected}")
            yield key, tensor
    if tied:
        missing.pop("lm_head.weight", None)
    if missing:
        some = ", ".join([*missing][:3]) + ", ..." * (len(missing) > 3)
        raise ValueError(f"{name} lacks {len(missing)} of this model's tensors: {some}")


def read_options(path):
    """The options of MambaConfig in a config.json, a dict. ValueError: not of such a model."""
    with blame(path):
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        ssm_cfg = saved.get("ssm_cfg") or {}
        found = {**saved, **ssm_cfg}
        for key, only in SUPPORTED.items():
            if found.get(key) not in (only, None):
                raise ValueError(f"{key} is {found[key]!r}; this model can only do {only!r}")
        if unknown := ssm_cfg.keys() - SSM_CFG:
            raise ValueError(f"this model does not know the option {unknown.pop()} in ssm_cfg")
        if "hidden_size" in saved:
            found = {TRANSFORMERS.get(key, key): value for key, value in saved.items()}
            found["pad_vocab_size_multiple"] = 1    # a row for each token and no more
        if missing := {"vocab_size", "d_model", "n_layer"} - found.keys():
            raise ValueError(f"not the config of a Mamba: it has no {', '.join(sorted(missing))}")
        return {key: found[key] for key in OPTIONS & found.keys()}


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
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        files = {str(file) for file in files}
    return [hub_file(name, file, cache_dir) for file in sorted(files)]


def read_weights(path, tied):
    """Yields (key, tensor) one by one, by the keys of mamba.py, but not a head that is tied."""
    with blame(path):
        open_file = open_safetensors if path.suffix == ".safetensors" else open_bin
        (tensor_of, keys), in_memory = open_file(path), 0
        for key in keys:
            # what was read of a mapping stays in memory as long as it: begin another one
            if in_memory > 2 ** 27:
                tensor_of, in_memory = open_file(path)[0], 0
            tensor = tensor_of(key)
            plain = tensor.dtype in DTYPES and tensor.layout == torch.strided
            if not plain or tensor.is_meta:
                raise ValueError(f"{key} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
            if tied and key == "lm_head.weight":
                embedding = tensor_of(next(k for k in keys if k.startswith("backbone.embedding")))
                same = tensor.data_ptr() == embedding.data_ptr() or torch.equal(tensor, embedding)
                if not same:
                    raise ValueError("lm_head.weight is not the embedding, but by config.json they "
                                     "are tied")
                continue
            in_memory += tensor.nbytes
            yield key.replace("backbone.embeddings.", "backbone.embedding."), tensor


def open_bin(path):
    """(a function of a key that gives its tensor, all keys)"""
    if not zipfile.is_zipfile(path):
        raise ValueError("not the zip file that torch.save writes since PyTorch 1.6")
    weights = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
    return weights.__getitem__, list(weights)


def open_safetensors(path):
    """The same of a .safetensors."""
    from safetensors import safe_open
    file = safe_open(path, framework="pt")
    return file.get_tensor, list(file.keys())


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


def hub_file(name, file, cache_dir=None, local=False):
    """
    The path of a file of a model. name: a folder, or a name on Hugging Face, such as
    state-spaces/mamba-130m; then the file is in Hugging Face's cache, or in cache_dir, into which
    it is downloaded unless local.
    FileNotFoundError: there is none.  PermissionError: it needs a login.
    ConnectionError: there is no network.
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
                              "reached: is there a network, or is HF_HUB_OFFLINE set? A folder "
                              "with the files works without") from None
    except errors.RepositoryNotFoundError:      # also what is said of one that needs a login
        raise PermissionError(f"{where}: Hugging Face has no such model, or it needs a login "
                              "(HF_TOKEN)") from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"Hugging Face has no {where}") from None
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403):
            raise
        raise PermissionError(f"{where}: Hugging Face wants a login (HF_TOKEN)") from None
