"""Translates between our models and Hugging Face's files of each family: config.json, and the names
and shapes of weights.

In memory, parameters have the names that they have in Hugging Face's GPT-2. Files of GPT-2 differ
only in some matrices, which are stored transposed: (in, out) where nn.Linear has (out, in). Files
of the Llama family have other names. They also store queries, keys and values as three matrices,
and gate and up as two, where we join each group into one.
"""
from dataclasses import dataclass, field

import torch

from support.flags import InputError

# {name of a field in config.json: the fields of GPTConfig that it fills in}
GPT2_FIELDS = {"n_positions": ["block_size"], "vocab_size": ["vocab_size"], "n_layer": ["n_layer"],
               "n_head": ["n_head"], "n_embd": ["n_embd"],
               "tie_word_embeddings": ["tie_word_embeddings"]}
LLAMA_FIELDS = {
    "max_position_embeddings": ["block_size"], "vocab_size": ["vocab_size"],
    "num_hidden_layers": ["n_layer"], "num_attention_heads": ["n_head"], "hidden_size": ["n_embd"],
    "num_key_value_heads": ["n_kv_head"], "head_dim": ["head_size"],
    "intermediate_size": ["n_inner"], "rms_norm_eps": ["norm_eps"],
    "tie_word_embeddings": ["tie_word_embeddings"], "attention_bias": ["proj_bias", "qkv_bias"],
    "mlp_bias": ["mlp_bias"]}
NUMBERS = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
           "original_max_position_embeddings")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")       # all else is a size

# Values of fields that a file may leave out; all other fields have to be there
LLAMA_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6,
                  "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
                  "rope_theta": 10_000.0}
# Fields for which only this value is supported
GPT2_FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False}

LLAMA_MODULES = {       # {our module: the modules in files that it joins}
    "ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.c_proj": ["mlp.down_proj"]}
NORMS_AFTER = {"ln_1": ["post_attention_layernorm"], "ln_2": ["post_feedforward_layernorm"]}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}    # torch's "approximate"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
HEAD = "lm_head.weight"


@dataclass
class Family:
    """Describes a family of models: what its files look like, and how it differs from Llama."""
    title: str                                          # how transformers' class names begin
    defaults: dict = field(default_factory=dict)        # its own, on top of LLAMA_DEFAULTS
    switches: dict = field(default_factory=dict)        # fields of GPTConfig that are always so
    modules: dict = field(default_factory=dict)         # its own, on top of LLAMA_MODULES
    fields: dict = field(default_factory=lambda: LLAMA_FIELDS)
    fixed: dict = field(default_factory=lambda: {"hidden_act": "silu"})


FAMILIES = {            # {model_type in config.json: its family}
    "gpt2": Family("GPT2", {"tie_word_embeddings": True}, fields=GPT2_FIELDS, fixed=GPT2_FIXED),
    "llama": Family("Llama"),
    "mistral": Family("Mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2", {"num_key_value_heads": 32}, {"qkv_bias": True}),
    "qwen3": Family("Qwen3", {"num_key_value_heads": 32, "head_dim": 128}, {"qk_norm": "head"}),
    "smollm3": Family("SmolLM3", {"num_key_value_heads": 4, "rope_theta": 2e6,
                                  "tie_word_embeddings": True, "no_rope_layer_interval": 4}),
    "olmo2": Family("Olmo2", {"rms_norm_eps": 1e-5}, {"qk_norm": "all", "norm_after": True},
                    NORMS_AFTER)}


# ------------------------------------------------------------------ config.json

def check_value(config, name, where):
    """Raises InputError if a field of config.json does not have the right type: a flag has to be
    true or false, a size a positive whole number. where: the folder, for the message."""
    value, is_bool = config.get(name), isinstance(config.get(name), bool)
    if name in FLAGS:
        right, wanted = is_bool, "is neither true nor false"
    elif name in NUMBERS:
        right, wanted = isinstance(value, (int, float)) and not is_bool, "is not a positive number"
    else:
        right, wanted = isinstance(value, int) and not is_bool, "is not a positive whole number"
    if not right or not is_bool and not 0 < value < float("inf"):
        raise InputError(f"{where}: config.json says {name} {value!r}, which {wanted}")


def our_sizes(config, where, say=print):
    """Translates a config.json (a dict) into fields of GPTConfig. where: the folder, for messages.
    say: called with a line if the model works differently here than in transformers. InputError if
    model.py can't compute such a model."""
    def refuse(name, supported):
        raise InputError(f"{where}: config.json says {name} {config.get(name)!r}, and only "
                         f"{supported} supported")

    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        refuse("model_type", f"{', '.join(map(repr, FAMILIES))} are")
    about = FAMILIES[family]
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: config.json has a quantization_config: a quantised model can't "
                         "be trained here; name the model that it was made from")
    for name, supported in about.fixed.items():
        if config.get(name, supported) != supported:
            refuse(name, f"{supported!r} is")
    if config.get("reward_head", "last") not in ("last", "sum"):
        refuse("reward_head", "'last' and 'sum' are")
    defaults = (LLAMA_DEFAULTS if family != "gpt2" else {}) | about.defaults
    # null stands for the default, except here: it says that there is no window
    config = defaults | {name: value for name, value in config.items()
                         if value is not None or name == "sliding_window"}
    sizes = {"family": family, "reward_head": config.get("reward_head", "last")}
    for theirs, ours in about.fields.items():
        if config.get(theirs) is not None or theirs not in defaults:
            check_value(config, theirs, where)
        sizes |= dict.fromkeys(ours, config.get(theirs))
    for part, whole in (("n_head", "n_embd"), ("n_kv_head", "n_head")):
        fixed = part == "n_head" and sizes.get("head_size")
        if sizes.get(part) and not fixed and sizes[whole] % sizes[part]:
            raise InputError(f"{where}: config.json says {field_of(part, family)} {sizes[part]}, "
                             f"which does not divide {field_of(whole, family)} {sizes[whole]}")
    if family != "gpt2":
        return sizes | llama_sizes(config, sizes, where, say) | about.switches
    activation = config.get("activation_function", "gelu_new")
    if activation not in list(GELU):
        refuse("activation_function", "'gelu_new' and 'gelu' are")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        refuse("n_inner", f"4 n_embd, {4 * config['n_embd']}, is")
    return sizes | {"gelu": GELU[activation]}


def field_of(ours, family):
    """Returns the name that a field of GPTConfig has in config.json."""
    return next(theirs for theirs, names in FAMILIES[family].fields.items() if ours in names)


def llama_sizes(config, sizes, where, say):
    """Returns the fields of GPTConfig that the Llama family has on top of GPT-2's; see our_sizes.
    """
    def refuse(name, wanted):
        raise InputError(f"{where}: config.json says {name} {config.get(name)!r}, {wanted}")

    if (sizes["head_size"] or sizes["n_embd"] // sizes["n_head"]) % 2:
        name = "head_dim" if sizes["head_size"] else "hidden_size"
        refuse(name, "which makes heads of an odd size: RoPE can't turn them in pairs")
    own = {"norm": "rms", "mlp": "swiglu"}
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling. If a file
    # has both, transformers takes rope_scaling.
    spelt = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(spelt) or {}
    if not isinstance(rope, dict):
        refuse(spelt, "which is not an object")
    rope = {"rope_theta": config["rope_theta"], **rope}
    check_value(rope, "rope_theta", where)
    own["rope_theta"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        refuse(spelt, "and only the types 'default' and 'llama3', of whole heads, are supported")
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")
        for name in names:
            check_value(rope, name, where)
        own["rope_scaling"] = {"rope_type": kind} | {name: rope[name] for name in names}
    if config["model_type"] == "smollm3":
        check_value(config, "no_rope_layer_interval", where)
        every, n_layer = config["no_rope_layer_interval"], min(sizes["n_layer"], 10_000)
        layers = config.get("no_rope_layers", [int((i + 1) % every > 0) for i in range(n_layer)])
        if not isinstance(layers, list) or len(layers) < n_layer or set(layers) - {0, 1}:
            refuse("no_rope_layers", "which is not a 0 or 1 for each layer")
        own["rope_layers"] = layers
    layer_types = config.get("layer_types", [])
    if not isinstance(layer_types, list):
        refuse("layer_types", "which is not a list")
    slides = (config["model_type"] == "mistral" or config.get("use_sliding_window")
              or "sliding_attention" in layer_types)
    if slides and config.get("sliding_window") is not None:
        check_value(config, "sliding_window", where)
        if config["sliding_window"] < sizes["block_size"]:      # up to there it sees everything
            say(f"{where}: texts may have {config['sliding_window']} tokens, its sliding_window, "
                f"not {sizes['block_size']}: attention that sees a part of a text is not supported")
            own["block_size"] = config["sliding_window"]
    own["token_ids"] = {name: config[name] for name in TOKENS if name in config}
    for name, value in own["token_ids"].items():
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not ids or any(type(token) is not int for token in ids):
            refuse(name, "which is not the number of a token")
    ends, pad = config.get("eos_token_id"), config.get("pad_token_id")
    is_end = pad is not None and pad in (ends if isinstance(ends, list) else [ends])
    if is_end and "SequenceClassification" in str(config.get("architectures")):
        say(f"{where}: its pad_token_id is its eos_token_id, {pad}, so transformers reads a reward "
            "at the token before it; here it is read at the end")
    return own


def config_fields(config, weights, eos_token_id):
    """Returns the content of a model's config.json. config: its GPTConfig. weights: {name: tensor};
    without a head for tokens they are a reward model's. eos_token_id: the token that ends a text
    (default: the one that was read, or else the vocabulary's last)."""
    about, last = FAMILIES[config.family], config.vocab_size - 1
    written = {theirs: getattr(config, ours[0]) for theirs, ours in about.fields.items()}
    written |= {"model_type": config.family, **about.fixed}
    tokens = dict(config.token_ids or {})
    ends = tokens.get("eos_token_id", last)
    if eos_token_id is not None and not (isinstance(ends, list) and eos_token_id in ends):
        ends = eos_token_id
    if config.family == "gpt2":
        activation = "gelu_new" if config.gelu == "tanh" else "gelu"
        written |= dict(n_ctx=config.block_size, activation_function=activation, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=ends, eos_token_id=ends)
    else:
        written |= {**tokens, "eos_token_id": ends, "rope_theta": config.rope_theta,
                    "rope_scaling": config.rope_scaling,
                    "torch_dtype": str(weights["transformer.wte.weight"].dtype)[len("torch."):]}
        written |= {"sliding_window": None} if config.family == "mistral" else {}
        written |= {"no_rope_layers": config.rope_layers} if config.rope_layers else {}
        written = {name: value for name, value in written.items()
                   if value is not None or name in ("rope_scaling", "sliding_window")}
    if HEAD in weights:
        classes = "LMHeadModel" if config.family == "gpt2" else "ForCausalLM"
        return written | {"architectures": [about.title + classes]}
    if config.reward_head != "last":
        return written | {"reward_head": config.reward_head}    # transformers has no such class
    ends = ends if isinstance(ends, list) else [ends]
    return written | {"architectures": [about.title + "ForSequenceClassification"],
                      "id2label": {"0": "reward"}, "label2id": {"reward": 0},
                      "pad_token_id": min(set(range(len(ends) + 1)) - set(ends))}


# ------------------------------------------------------------------ names of weights

def names_in_files(family, n_layer):
    """Yields (our name, [names in files]) of the tensors of the Llama family."""
    modules = LLAMA_MODULES | FAMILIES[family].modules
    for kind in ("weight", "bias"):
        yield f"transformer.wte.{kind}", [f"model.embed_tokens.{kind}"]
        yield f"transformer.ln_f.{kind}", [f"model.norm.{kind}"]
        for layer in range(n_layer):
            for module, theirs in modules.items():
                yield (f"transformer.h.{layer}.{module}.{kind}",
                       [f"model.layers.{layer}.{part}.{kind}" for part in theirs])


def join_tensors(tensors, family):
    """Gives the tensors of a file, {name: tensor}, our names, and joins those that are one matrix
    here. Changes the dictionary in place; tensors that can't be joined keep their names."""
    n_layer = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    for name, theirs in names_in_files(family, n_layer):
        if all(part in tensors for part in theirs):
            tensors[name] = torch.cat([tensors.pop(part) for part in theirs])


def rows_of_parts(config, n_parts, rows):
    """Returns how many rows of one of our matrices belong to each part that it has in files:
    queries, keys and values, or gate and up. n_parts: how many parts. rows: how many in all."""
    size = config.head_size or config.n_embd // config.n_head
    kv_width = (config.n_kv_head or config.n_head) * size
    widths = {3: [config.n_head * size, kv_width, kv_width], 2: [rows // 2] * 2}
    return widths.get(n_parts, [rows])


def parts_in_files(model, layer):
    """Returns the linear layers that files have in place of one of ours, [(name, rows)]. Their
    outputs, one after another, are the outputs of ours. layer: its name."""
    config, rows = model.config, model.get_submodule(layer).out_features
    if config.family == "gpt2":
        return [(layer, rows)]
    theirs = dict(names_in_files(config.family, config.n_layer))[f"{layer}.weight"]
    names = [name.removesuffix(".weight") for name in theirs]
    return list(zip(names, rows_of_parts(config, len(names), rows)))


def file_tensors(weights, config):
    """Returns a model's tensors, {name: tensor}, with the names and shapes of its family's files.
    """
    tensors = dict(weights)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    if config.family == "gpt2":
        return {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
                for name, tensor in tensors.items()}
    for name, theirs in names_in_files(config.family, config.n_layer):
        if name in tensors:
            joined = tensors.pop(name)
            parts = joined.split(rows_of_parts(config, len(theirs), len(joined)))
            tensors |= {part: tensor.clone() for part, tensor in zip(theirs, parts)}
    return tensors
