"""Reads tiktoken's encodings and models' own tokenizers; writes Hugging Face's tokenizer.json.

Runs remember a tokenizer by its name. An encoding's is a word ("tinytldr", "gpt2"). A
model's own tokenizer is next to the model, in a folder or on the hub, and its name is that of the
folder, with a "/" at the end.

Chat messages become text by the model's own chat template, as in `transformers`. Models without one
get the layout of Anthropic's HH dialogues: "Human: ..." and "Assistant: ...", each after an empty
line.
"""
import datetime
import functools
import json
import os
import re
from itertools import chain, takewhile
from pathlib import Path

import tiktoken

from support.checkpoint import Finder, read_sizes
from support.device import RANK
from support.flags import InputError, in_a_line, naming
from support.run import json_object, read_json, replacing, run_flags, write_json

MAIN_FILES = ("tokenizer.json", "vocab.json")       # a folder with one of them has a tokenizer
OTHER_FILES = ("merges.txt", "added_tokens.json", "tokenizer_config.json",
               "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System",
         "tool": "Tool"}            # as messages have them, and as HH's layout names them
HH_SOURCE = ("{% for message in messages %}{{ '\n\n' + names[message['role']] + ': ' + "
             "message['content'] }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")
MARK = "\ufdd0"         # a character that no text has; see ChatTemplate.guard
# The date that templates are given: the default of Llama 3's. With the real one, two runs on
# different days would read different tokens.
A_DAY = datetime.date(2024, 7, 26)


def read_tokenizer(name):
    """Returns the tokenizer of this name. InputError if there is none, or no network."""
    name = tokenizer_name(name)
    return FolderTokenizer(name) if name.endswith("/") else tiktoken_encoding(name)


def tokenizer_name(name):
    """Returns the name of the tokenizer that --tokenizer stands for: a word, a folder, or a file in
    that folder."""
    if name in ("tinytldr", *tiktoken.list_encoding_names()) or name.endswith("/"):
        return name
    if os.path.basename(name) in MAIN_FILES:
        name = os.path.dirname(name) or "."
    return f"{name}/" if os.path.isdir(name) else name


def tiktoken_encoding(name):
    """Returns a tiktoken.Encoding, downloaded on first use. InputError if there is none, or no
    network."""
    try:
        return as_tokenizer(tiktoken.get_encoding(name))
    except ValueError as error:
        raise InputError(f"--tokenizer: there is no encoding {name!r}; use tinytldr, gpt2, another "
                         "name that tiktoken knows, or the folder of a model") from error
    except Exception as error:     # it downloads through whatever raises here
        raise InputError(f"--tokenizer: tiktoken could not download its {name!r} encoding "
                         f"({type(error).__name__}); on a machine without network, point "
                         "TIKTOKEN_CACHE_DIR at a copy of its cache") from error


def as_tokenizer(encoding):
    """Gives a tiktoken.Encoding what a FolderTokenizer has: no tokens at a text's start, one that
    ends it, HH's layout for messages. Returns the encoding."""
    encoding.start, encoding.ends, encoding.template = [], [encoding.eot_token], HH
    encoding.encode_inside = encoding.encode_ordinary_batch
    return encoding


def known_tokenizer(model):
    """Returns the name of the tokenizer that a model was trained with, as its run says, or that is
    in files next to it; None if there is neither. model: a folder or hub name."""
    name = run_flags(model).get("tokenizer")
    if isinstance(name, str) and not name.endswith("/"):
        return name
    find = Finder(model)
    return model.rstrip("/") + "/" if any(map(find.optional, MAIN_FILES)) else None


def own_tokenizer(model, data=None):
    """Returns the name of the tokenizer that a model reads. A model that has none is taken for a
    GPT-2, or for a model of tinytldr where --data is, which is printed. InputError if neither
    fits."""
    name = known_tokenizer(model)
    if name is not None:
        return name
    vocab_size = read_sizes(model)["vocab_size"]
    padded = Finder(model).nanogpt is not None and vocab_size == 50304      # a multiple of 64
    if vocab_size == 50257 or padded:
        name = "gpt2"
    elif data == "tinytldr":
        name = data
    else:
        raise InputError(f"{model}: it has no tokenizer (no tokenizer.json, no vocab.json), and "
                         f"its vocab_size, {vocab_size}, is not GPT-2's; copy the model's own "
                         "tokenizer files there, or train it with --tokenizer and its name")
    if RANK == 0:
        print(f"{model}: no tokenizer there; it is taken to read the tokens of {name}")
    return name


# ------------------------------------------------------------------ chat templates


class ChatTemplate:
    """Renders messages, [{"role": "user", "content": "Hi"}, ...], by a template in the language of
    jinja2.

    source: the template. variables: what it may read besides the messages, such as bos_token.
    specials: the texts of the tokenizer's special tokens.
    """

    def __init__(self, source, variables, specials=()):
        self.source, self.variables = source, variables
        longest_first = sorted(filter(None, specials), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages, generate=False, thinking=False):
        """Returns the text of messages. generate: whether to end it where the assistant's next turn
        begins. thinking: whether to ask a model that can think for its thoughts. ValueError if the
        template does not take the messages."""
        try:
            return compile_template(self.source).render(
                messages=messages, add_generation_prompt=generate, tools=None, documents=None,
                enable_thinking=thinking, **self.variables)
        except Exception as error:      # jinja2 has its own errors, and templates may raise any
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def guard(self, message):
        """Returns a message with a MARK inside each special token that is written in it. There it
        is ordinary text, and not one of the special tokens that the template writes."""
        def marked(match):
            return match[0][0] + MARK + match[0][1:]
        return {name: self.special.sub(marked, value) if isinstance(value, str) else value
                for name, value in message.items()}

    def end_of_turn(self):
        """Returns the text of the special token that ends a turn of the assistant, or None."""
        asked = [{"role": "user", "content": "a"}]
        try:
            head = self.render(asked, generate=True)
        except ValueError:      # some templates want a system message
            asked = [{"role": "system", "content": "c"}, *asked]
            head = self.render(asked, generate=True)
        whole = self.render([*asked, {"role": "assistant", "content": "b"}])
        tail = whole[len(head):].removeprefix("b").lstrip()
        match = self.special.match(tail) if whole.startswith(head) else None
        return match and match[0]


@functools.lru_cache
def compile_template(source):
    """Compiles a chat template. It may use what `transformers` offers to templates, and no more."""
    from jinja2 import ext, nodes, sandbox  # a package that torch brings

    class Generation(ext.Extension):
        """Understands {% generation %}, with which some templates mark the assistant's turns."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def refuse(message):
        raise ValueError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": A_DAY.strftime}
    return environment.from_string(source)


HH = ChatTemplate(HH_SOURCE, {"names": ROLES})


# ------------------------------------------------------------------ a model's own tokenizer


class FolderTokenizer:
    """Reads a model's own tokenizer with Hugging Face's `tokenizers`: tokenizer.json, or the
    vocab.json and merges.txt of older models. Has the methods of a tiktoken.Encoding that are used
    here. Special tokens that are written in a text are read as text.

    name: a folder or hub name and "/". files: {file name: bytes}, to copy next to what is trained.
    start: the tokens with which a text begins, such as Llama 3's BOS. template: the model's
    ChatTemplate, or HH's layout. ends: the tokens in which the model may end a response, first
    eot_token, in which responses are trained to end.
    """

    def __init__(self, name):
        self.name, self.files, find = name, {}, Finder(name.rstrip("/") or "/")
        paths = {filename: find.optional(filename) for filename in MAIN_FILES + OTHER_FILES}
        self.files = {filename: Path(path).read_bytes() for filename, path in paths.items()
                      if path is not None}
        if not set(MAIN_FILES) & set(self.files):
            raise InputError(f"{name}: no tokenizer in this folder (no tokenizer.json, no "
                             "vocab.json)")
        if "tokenizer.json" not in self.files and (
                "merges.txt" not in self.files or "added_tokens.json" in self.files):
            raise InputError(f"{name}: transformers can make a tokenizer.json of vocab.json and "
                             "what is next to it: AutoTokenizer.from_pretrained(...)"
                             ".save_pretrained(...)")
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(f"{name}: reading a model's own tokenizer needs the package "
                             "tokenizers: pip install tokenizers") from error
        try:
            if "tokenizer.json" in self.files:
                self.tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
            else:
                model = tokenizers.models.BPE.from_file(paths["vocab.json"], paths["merges.txt"])
                self.tokenizer = tokenizers.Tokenizer(model)
                self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
                self.tokenizer.decoder = tokenizers.decoders.ByteLevel()
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            if getattr(self.tokenizer.model, "dropout", None):
                self.tokenizer.model.dropout = None         # the same text, the same tokens
            self.tokenizer.encode_special_tokens = True     # as ordinary text
            self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
            added = self.tokenizer.get_added_tokens_decoder()
            example = self.tokenizer.encode("a", add_special_tokens=True)
        except Exception as error:      # a damaged file raises many kinds
            raise InputError(f"{name}: unreadable tokenizer: {in_a_line(error)}") from error
        self.n_vocab = max(self.vocabulary.values(), default=-1) + 1
        self.special = {number: token.content for number, token in added.items() if token.special}
        is_special = zip(example.ids, example.special_tokens_mask)
        self.start = [token for token, _ in takewhile(lambda pair: pair[1], is_special)]
        self._read_settings(find)
        self.special[self.eot_token] = self.decode([self.eot_token])
        self.before = MARK      # put before a text that continues another one
        if self.encode_inside(["a"]) == [self.encode_ordinary("a")]:    # no space is added
            self.before = ""

    def _read_settings(self, find):
        """Finds the chat template, and the token that ends a response: the template's end of a
        turn, or the tokenizer's eos_token, or <|endoftext|>, or the model's eos_token_id, which may
        be a list. Says so where it is none of the model's."""
        settings, variables = {}, {}
        for filename in ("special_tokens_map.json", "tokenizer_config.json"):
            settings = json_object(self.files.get(filename, b"{}"), self.name + filename)
            variables |= {key: text_of(value) for key, value in settings.items()
                          if key.endswith("_token") and text_of(value) is not None}
            eos = variables.get("eos_token")
            if eos is not None and eos not in self.vocabulary:
                raise InputError(f"{self.name}{filename}: its eos_token, {eos!r}, is no token of "
                                 "this tokenizer")
        self.template, end, template = HH, None, self._template_source(settings)
        if template:
            self.template = ChatTemplate(template, variables, self.special.values())
            with naming(self.name):
                try:
                    end = self.vocabulary.get(self.template.end_of_turn())
                except ValueError as error:
                    raise InputError(in_a_line(error)) from error
        if end is None:
            end = self.vocabulary.get(variables.get("eos_token", END_OF_TEXT))

        ends = []           # of the model
        for filename in ("config.json", "generation_config.json"):
            path = find.optional(filename)
            if path is not None:
                value = read_json(path).get("eos_token_id")
                ends = ends if value is None else value if isinstance(value, list) else [value]
        # A config.json has GPT-2's 50256 by default, whatever it is in another vocabulary.
        ends = [number for number in ends if type(number) is int and 0 <= number < self.n_vocab
                and (number != 50256 or number in self.special)]
        if end is None and not ends:
            raise InputError(f"{self.name}: which token ends a text? Give tokenizer_config.json an "
                             "eos_token")
        self.eot_token = ends[0] if end is None else end
        listed = self.eot_token in ends     # if not, they may be the defaults of config.json
        self.ends = [self.eot_token, *(number for number in ends if number != self.eot_token
                                       and (listed or number in self.special))]
        if ends and end not in (None, *ends):
            print(f"{self.name}: responses are trained to end in token {end}, as its tokenizer "
                  f"says, and not in {ends[0]}, the model's eos_token_id")
            self.files.pop("generation_config.json", None)      # what is trained ends otherwise

    def _template_source(self, settings):
        """Returns the source of the chat template; None or "" if there is none. settings: what is
        in tokenizer_config.json, where it may be a list of named ones."""
        jinja = self.files.get("chat_template.jinja")
        if jinja is not None:
            return jinja.decode(errors="replace")
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {each.get("name"): each.get("template") for each in template
                     if isinstance(each, dict)}
            template = named.get("default", template)
        if template is not None and not isinstance(template, str):
            raise InputError(f"{self.name}tokenizer_config.json: its chat_template is neither text "
                             "nor a list with one that is named 'default'; write the one that is "
                             "meant into a file chat_template.jinja next to it")
        return template

    @property
    def special_tokens_set(self):
        return set(self.special.values())

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts, num_threads=None):
        """Returns lists of token ids, one for each text. `tokenizers` chooses the number of
        threads."""
        return [encoding.ids for encoding in self._encode(texts, self.tokenizer.encode_batch_fast)]

    def encode_inside(self, texts, num_threads=None):
        """Encodes texts that continue another text. Some tokenizers, such as Llama 2's, put a
        space where a text begins, which is not wanted here. Returns lists of token ids."""
        if not self.before:
            return self.encode_ordinary_batch(texts)
        encodings = self._encode([self.before + text for text in texts])
        return [self._after(each, self.before)[0] for each in encodings]

    def _after(self, encoding, before):
        """Returns (token ids, where each ends) of an encoded text, without those of the text
        `before` with which it begins."""
        pairs = [(token, end - len(before)) for token, (_, end) in
                 zip(encoding.ids, encoding.offsets) if not before or end > len(before)]
        return [token for token, _ in pairs], [end for _, end in pairs]

    def encode_rendered(self, texts, inside=False):
        """Encodes what a chat template wrote, in which its special tokens are tokens. inside: the
        texts continue others. Returns for each text (token ids, where each of them ends in the
        text)."""
        before = self.before if inside else ""
        self.tokenizer.encode_special_tokens = False
        try:
            encodings = self._encode([before + text for text in texts if MARK not in text])
        finally:
            self.tokenizer.encode_special_tokens = True
        plain = (self._after(each, before) for each in encodings)
        return [self._encode_marked(text) if MARK in text else next(plain) for text in texts]

    def _encode_marked(self, text):
        """Encodes a rendered text in which people wrote special tokens; see ChatTemplate.guard."""
        ids, ends, place = [], [], 0
        for piece in re.split(f"({self.template.special.pattern})", text):
            if self.template.special.fullmatch(piece):
                ids.append(self.vocabulary[piece])
                ends.append(place + len(piece))
            elif piece:
                encoding, = self._encode([piece.replace(MARK, "")])
                kept = [place + i for i, letter in enumerate(piece) if letter != MARK]
                ids += encoding.ids
                ends += [kept[end - 1] + 1 if end else place for _, end in encoding.offsets]
            place += len(piece)
        return ids, ends

    def _encode(self, texts, encode_batch=None):
        try:
            return (encode_batch or self.tokenizer.encode_batch)(texts, add_special_tokens=False)
        except Exception as error:      # it has no type of its own
            raise InputError(f"{self.name}: the tokenizer can't read all text: "
                             f"{in_a_line(error)}") from error

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


# ------------------------------------------------------------------ text to token ids and back


def encode_text(text, tokenizer):
    """Returns the token ids of a text, in which special tokens are ordinary text. ValueError if the
    tokenizer can't read it: tiktoken panics at a million spaces."""
    if re.search(r"\s{500001}", text):
        raise ValueError("more than 500,000 characters of white space in a row, which the "
                         "tokenizer can't read")
    try:
        return tokenizer.encode_ordinary(text)
    except BaseException as error:      # tiktoken's is no Exception, and has no name to import
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizer can't read this text; is it very long and without "
                         "spaces?") from None


def prompt_ids(prompt, tokenizer):
    """Returns the token ids of a prompt, text or chat messages. It begins with a BOS token if the
    model wants one; an empty prompt is the end-of-text token alone. ValueError if it can't be read.
    """
    template = tokenizer.template
    if not isinstance(prompt, str):
        prompt = template.render([template.guard(each) for each in prompt], generate=True)
        if template is not HH:
            return tokenizer.encode_rendered([prompt])[0][0]
    return tokenizer.start + encode_text(prompt, tokenizer) or [tokenizer.eot_token]


def to_text(response, tokenizer):
    """Returns a sample as text, without the token that ends it, and without ids that only a
    vocabulary padded beyond the tokenizer's has."""
    kept = [token for token in response if token < tokenizer.n_vocab]
    if kept and kept[-1] in tokenizer.ends:
        del kept[-1]
    return tokenizer.decode(kept)


END_OF_TEXT = "<|endoftext|>"
SPLIT_INTO_WORDS = r" ?[A-Za-z']+| ?[^\sA-Za-z']+|\s"     # all characters: any text round-trips


def word_encoding(name, texts):
    """Returns a tiktoken.Encoding of the 256 bytes, then every word of the texts (with and without
    a space before it) as one token, then the end of text. Other text falls back to bytes."""
    pieces = {piece for text in texts for piece in re.findall(SPLIT_INTO_WORDS, text)}
    pieces |= {" " + piece for piece in pieces if not piece.startswith(" ")}
    words = [bytes([b]) for b in range(256)]
    words += sorted(piece.encode() for piece in pieces if len(piece.encode()) > 1)
    return as_tokenizer(tiktoken.Encoding(
        name=name, pat_str=SPLIT_INTO_WORDS, special_tokens={END_OF_TEXT: len(words)},
        mergeable_ranks={word: rank for rank, word in enumerate(words)}))


# ------------------------------------------------------------------ comparing, writing


def check_vocabulary(model, tokenizer, where):
    """Raises InputError if the model has no room for all of the tokenizer's tokens. where: a
    flag."""
    if model.config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{where}: the model knows {model.config.vocab_size} tokens, and "
                         f"{tokenizer.name} has {tokenizer.n_vocab}")


def text_of(token):
    """Returns the text of a token in tokenizer_config.json, where it is a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def fingerprint(tokenizer):
    """Returns a list of what the tokens of a text depend on, for the names of cached files."""
    if isinstance(tokenizer, FolderTokenizer):
        return [tokenizer.eot_token, *chain.from_iterable(sorted(tokenizer.files.items()))]
    words = b"\0".join(tokenizer.token_byte_values())
    return [tokenizer.name, tokenizer.n_vocab, tokenizer._pat_str, words]


def vocabulary(tokenizer):
    """Returns {token as tokenizer.json writes it: number}."""
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.vocabulary
    letters = byte_letters()
    words = {"".join(letters[byte] for byte in word): number
             for word, number in tokenizer._mergeable_ranks.items()}
    return words | tokenizer._special_tokens


def check_same_tokenizer(what, model, tokenizer):
    """Raises InputError if a model reads other tokens than a tokenizer's: encodings are compared by
    name, all else by content. what: the beginning of the message; model: a folder."""
    name = run_flags(model).get("tokenizer")
    if name is None and known_tokenizer(model) is None:
        print(f"{what} has no tokenizer; it is taken to read the policy's tokens")
        return
    by_content = not isinstance(name, str) or name.endswith("/") or tokenizer.name.endswith("/")
    if by_content:
        name = model.rstrip("/") + "/"
        other = FolderTokenizer(name)       # does each number mean the same text, or the end?
        equal = (vocabulary(tokenizer) == vocabulary(other)
                 and tokenizer.eot_token == other.eot_token)
    else:
        equal = name == tokenizer.name
    if not equal:
        raise InputError(f"{what} reads {name} tokens, the policy {tokenizer.name} tokens")


def check_same_tokens(what, model, config, policy_config, tokenizer):
    """Raises InputError if a model can't read what the policy writes: another tokenizer, a smaller
    vocabulary, shorter texts. what: the beginning of the message; model: its folder."""
    check_same_tokenizer(what, model, tokenizer)
    for name in ("vocab_size", "block_size"):
        size, needed = getattr(config, name), getattr(policy_config, name)
        if size < needed:
            raise InputError(f"{what} has {name} {size}, the policy {needed}")


def save_tokenizer(directory, tokenizer, block_size):
    """Writes a tokenizer next to a model, for `transformers`: its own files, as they are; a
    tiktoken.Encoding as tokenizer.json and tokenizer_config.json.

    tiktoken merges two neighbours if together they are a token, those with the lowest rank first.
    tokenizer.json lists pairs to merge: every way to cut a token in two tokens.
    """
    if RANK > 0:
        return
    if isinstance(tokenizer, FolderTokenizer):
        os.makedirs(directory, exist_ok=True)
        for filename, content in tokenizer.files.items():
            with replacing(os.path.join(directory, filename)) as temporary:
                Path(temporary).write_bytes(content)
        return
    ranks = tokenizer._mergeable_ranks                                      # {bytes: id}
    letters = byte_letters()
    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.get):
        text = "".join(letters[byte] for byte in token)
        vocab[text] = ranks[token]
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append(f"{text[:cut]} {text[cut:]}")         # a letter for each byte
    special = [{"id": number, "content": name, "special": True, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False}
               for name, number in tokenizer._special_tokens.items()]
    pattern = tokenizer._pat_str.replace("}+", "}")     # "possessive" there; here "several times"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": True, "vocab": vocab, "merges": merges}
    write_json(os.path.join(directory, "tokenizer.json"), {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None, "decoder": as_bytes, "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]}})
    end = tokenizer.decode([tokenizer.eot_token])
    write_json(os.path.join(directory, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
        "model_max_length": block_size, "clean_up_tokenization_spaces": False})


def byte_letters():
    """Returns {byte: letter} as GPT-2 writes bytes: printable ones as they are, the others from 256
    on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printable)
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})
