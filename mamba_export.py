"""
A model for other programs: as ONNX, with a file of a few lines that writes text with it, and its
weights and its tokenizer as transformers reads them.
"""
import contextlib
import copy
import io
import itertools
import json
import logging
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import mamba
from mamba_files import OF_LAYER, OF_MODEL, TABLES, TRANSFORMERS, of_characters, write_files

# ---- ONNX ----------------------------------------------------------------------------------------


def write_onnx(model, folder, tokenizer):
    """
    Writes into a folder, all or nothing:
    step.onnx       token (B,), conv_0, h_0, conv_1, ... -> logits (B, vocab_size), the next states
    read.onnx       tokens (B, L), a prompt -> logits (B, vocab_size) after it, its states; layers
                    of Mamba-2 and 3 have none, and read a prompt step by step
    tokenizer.json  or alphabet.json, which is all of a tokenizer for characters
    generate.py     writes text with them, by onnxruntime and numpy (and tokenizers) alone
    What they compute is what the model does, adapters and hooks included, in float32.
    ValueError: something in the model has no form in ONNX.  ImportError: onnxscript is missing.
    OSError: the disk is full, ...
    """
    import onnxscript  # noqa: F401 (here, so that what is missing is known before the work)
    model = copy.deepcopy(model).cpu().float().eval()
    for block in model.modules():
        if isinstance(block, mamba.Mixer):
            block.scan = "sequential"       # by one_by_one
    state = model.init_state(2)             # of an example with 2 rows
    names = [f"{part}_{i}" for i, layer in enumerate(state) for part in layer._fields]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    step = exported(Step(model), (torch.tensor([0, 1]), tensors_of(state)),
                    ({0: batch}, [{0: batch}] * len(names)), ["token", *names], names)
    graphs, way = {"step.onnx": step.save}, READ_BY_STEPS
    if model.config.layer == "mamba":
        # with a length of its own each time, the loop over the steps has to be one of ONNX
        with mock.patch.object(mamba, "one_by_one", any_steps):
            read = exported(Read(model), (torch.zeros(2, 8, dtype=torch.long),),
                            ({0: batch, 1: length},), ["tokens"], names)
        graphs["read.onnx"], way = read.save, READ_AT_ONCE
    vocabulary, text, script = alphabet_or_json(tokenizer, way)
    write_files(Path(folder), {**graphs, vocabulary: text, "generate.py": script})


class Step(nn.Module):
    """(B,) tokens and the tensors of a state -> logits (B, vocab_size), those of the next state."""

    def __init__(self, model):
        super().__init__()
        self.model, self.kinds = model, [type(layer) for layer in model.init_state(1)]

    def forward(self, token, state):
        parts = iter(state)
        state = [kind(*itertools.islice(parts, len(kind._fields))) for kind in self.kinds]
        logits, _, state = self.model(token[:, None], state=state)
        return logits[:, 0], tensors_of(state)


class Read(Step):
    """(B, L) tokens -> logits (B, vocab_size) after the last, the tensors of the state."""

    def forward(self, tokens):
        state = self.model.init_state(tokens.shape[0])
        logits, _, state = self.model(tokens, state=state, num_last_tokens=1)
        return logits[:, 0], tensors_of(state)


def tensors_of(state):
    return [tensor for layer in state for tensor in layer]


def exported(module, inputs, dynamic_shapes, input_names, state_names):
    """The ONNX program of a module. ValueError: it has none."""
    output_names = ["logits", *(f"next_{name}" for name in state_names)]
    with quiet():
        try:
            return torch.onnx.export(
                module.eval(), inputs, dynamic_shapes=dynamic_shapes, input_names=input_names,
                output_names=output_names, dynamo=True, verbose=False,
                custom_translation_table={torch.ops.mamba_export.steps.default: steps_in_onnx()})
        except torch.onnx.errors.OnnxExporterError as error:
            cause = error
            while cause.__cause__:
                cause = cause.__cause__
            reason = str(cause).strip().split("\n")[0]
            raise ValueError(f"this model cannot be written as ONNX: {reason}") from error


@contextlib.contextmanager
def quiet():
    """Without what the exporter says of itself, and the graphs that it prints where it fails."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def any_steps(u, delta, A, B, C, h):
    """mamba.one_by_one as an operator that the exporter does not look into."""
    return torch.ops.mamba_export.steps(u, delta, A, B, C, h)


steps = torch.library.custom_op("mamba_export::steps", mamba.one_by_one, mutates_args=(), schema=(
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor h) -> (Tensor, Tensor)"))
steps.register_fake(lambda u, delta, A, B, C, h: (torch.empty_like(u), torch.empty_like(h)))


def steps_in_onnx():
    """The same as a function of ONNX, where Scan is a loop over the steps of its inputs."""
    global FLOAT        # where onnxscript looks for what annotations name
    from onnxscript import FLOAT, graph, script
    from onnxscript import opset18 as op

    @script(default_opset=op)
    def steps(u: FLOAT, delta: FLOAT, A: FLOAT, B: FLOAT, C: FLOAT,
              h: FLOAT) -> tuple[FLOAT, FLOAT]:
        A_t = op.Transpose(A, perm=[1, 0])  # (N, D): channels innermost, as in mamba.py's tiles
        first = op.Transpose(h, perm=[0, 2, 1])
        deltas, xs = op.Unsqueeze(delta, [2]), op.Unsqueeze(delta * u, [2])     # (B, L, 1, D)
        Bs, Cs = op.Unsqueeze(B, [3]), op.Unsqueeze(C, [2])

        @graph()
        def step(before, x_t, delta_t, B_t, C_t):
            after = op.Exp(delta_t * A_t) * before + B_t * x_t              # (B, N, D)
            y_t = op.MatMul(C_t, after)                                     # (B, 1, D)
            return after, y_t

        last, ys = op.Scan(first, xs, deltas, Bs, Cs, body=step, num_scan_inputs=4,
                           scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1])
        y = op.Squeeze(ys, [2])
        h_last = op.Transpose(last, perm=[0, 2, 1])
        return y, h_last
    return steps


# what the person gets beside the graphs
GENERATE = '''\
"""Continues a text by 200 tokens, at temperature 0.8: python generate.py "ROMEO:" 200 0.8"""
%(imports)s

start, length, temperature = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
%(open)s
%(graphs)s
ids = %(encode)s
%(read)s
for _ in range(int(length)):
    token = (logits + float(temperature) * np.random.gumbel(size=logits.shape)).argmax(1)
    ids.append(int(token[0]))
    logits, *state = step.run(None, dict(zip((i.name for i in step.get_inputs()), [token, *state])))
print(%(decode)s)
'''
READ_AT_ONCE = {
    "graphs": 'read, step = (onnxruntime.InferenceSession(f"{sys.path[0]}/{x}.onnx") '
              'for x in ("read", "step"))',
    "read": 'logits, *state = read.run(None, {"tokens": np.array([ids], np.int64)})'}
READ_BY_STEPS = {
    "graphs": 'step = onnxruntime.InferenceSession(f"{sys.path[0]}/step.onnx")',
    "read": "names = [i.name for i in step.get_inputs()]\n"
            "state = [np.zeros([1, *i.shape[1:]], np.float32) for i in step.get_inputs()[1:]]\n"
            "for token in ids:\n"
            "    logits, *state = step.run(None, dict(zip(names, [np.array([token]), *state])))"}
OF_CHARACTERS = {
    "imports": "import json\nimport sys\n\nimport numpy as np\nimport onnxruntime",
    "open": 'alphabet = json.load(open(f"{sys.path[0]}/alphabet.json"))',
    "encode": "[alphabet.index(character) for character in start]",
    "decode": '"".join(alphabet[i] for i in ids)'}
OF_PIECES = {
    "imports": "import sys\n\nimport numpy as np\nimport onnxruntime\n"
               "from tokenizers import Tokenizer",
    "open": 'tokenizer = Tokenizer.from_file(f"{sys.path[0]}/tokenizer.json")',
    "encode": "tokenizer.encode(start, add_special_tokens=False).ids",
    "decode": "tokenizer.decode(ids, skip_special_tokens=False)"}


def alphabet_or_json(tokenizer, read):
    """The name and the text of the file that keeps a tokenizer, and the text of generate.py. read:
    READ_AT_ONCE or READ_BY_STEPS."""
    saved = tokenizer.to_dict()
    if saved["type"] == "char":
        return "alphabet.json", json.dumps(saved["chars"]), GENERATE % {**OF_CHARACTERS, **read}
    return "tokenizer.json", saved["json"], GENERATE % {**OF_PIECES, **read}

# ---- Weights and tokenizer for transformers ------------------------------------------------------


def as_transformers(options, weights):
    """config.json, a dict, and weights of transformers, for options and weights by our names. Its
    head, if not tied, and embedding have no padding rows.  ValueError: it has no such model."""
    layer = options["layer"]
    if layer == "mamba3":
        raise ValueError("transformers has no Mamba-3")
    if mlp := options["d_intermediate"]:
        raise ValueError(f"the Mamba of transformers has no MLP, but d_intermediate is {mlp}")
    if not options.get("rmsnorm", True) or options.get("norm_before_gate", False):
        raise ValueError("the Mamba-2 of transformers has its norm behind the gate, always")
    kind = "falcon_mamba" if options["mixer_rms_eps"] > 0 else layer
    architecture = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}[kind]
    known = OF_MODEL | OF_LAYER[layer]
    config = {
        "architectures": [f"{architecture}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
        **{theirs: options[ours] for theirs, ours in TRANSFORMERS.items() if ours in known},
        # of the same name in both, or ours alone, for who reads it back
        **{key: options[key] for key in ("vocab_size", "expand", "residual_in_fp32", "dropout",
                                         "scan", "chunk_size", "A_init_range") if key in options},
        "torch_dtype": str(weights[TABLES[0]].dtype).removeprefix("torch."),
        # by default it is token 0 that ends a text there; generation_config.json may name another
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "falcon_mamba":
        config["mixer_rms_eps"] = options["mixer_rms_eps"]
    if kind == "mamba2":
        config["num_heads"] = options["d_model"] * options["expand"] // options["headdim"]
    tables = TABLES[:1] if options["tie_embeddings"] else TABLES
    cut = {key: weights[key][:options["vocab_size"]] for key in tables}
    rest = {key: tensor for key, tensor in weights.items() if key not in TABLES}
    return config, {key.replace("embedding.", "embeddings."): tensor.contiguous()
                    for key, tensor in {**cut, **rest}.items()}


def write_tokenizer(folder, tokenizer, model):
    """
    Writes tokenizer.json, tokenizer_config.json and generation_config.json into a folder, all or
    nothing. With them AutoTokenizer.from_pretrained(folder) of transformers encodes and decodes as
    this tokenizer of tokens.py does, and generate ends at its end of a text, if it has one.
    ValueError: the tokenizer has more tokens than the model.  OSError: the disk is full, ...
    """
    write_files(Path(folder), tokenizer_files(tokenizer.to_dict(), model.config.vocab_size))


def tokenizer_files(saved, vocab_size):
    """{name: text} of these files for a tokenizer whose to_dict() this was. ValueError: it has more
    tokens than the model knows, vocab_size."""
    if saved["type"] == "char":
        content, end_of_text = of_characters(saved["chars"]), None
        tokens = len(saved["chars"])
    else:
        from tokenizers import Tokenizer  # only here: characters do without
        tokenizer, content = Tokenizer.from_str(saved["json"]), json.loads(saved["json"])
        content["post_processor"] = None    # it could add tokens before and after a text
        end_of_text = tokenizer.token_to_id("<|endoftext|>")
        tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > vocab_size:
        raise ValueError(f"the tokenizer has {tokens} tokens, and the model knows {vocab_size}")
    # transformers would else take another class, by the type of the model, and tidy up spaces
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if end_of_text is not None:
        config["eos_token"] = "<|endoftext|>"
    files = {"tokenizer.json": content, "tokenizer_config.json": config,
             "generation_config.json": {"eos_token_id": end_of_text}}
    return {name: json.dumps(value, indent=2) for name, value in files.items()}
