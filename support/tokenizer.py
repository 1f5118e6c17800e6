"""Reads tiktoken's encodings and models' own tokenizers; writes Hugging Face's tokenizer.json.

A tokenizer has a name, by which runs remember it: a word for an encoding ("tinytldr", "gpt2"), a
path that ends in "/" for a model's own, which is in this folder (or on the hub) next to the model.
"""
import os
import re
from itertools import chain
from pathlib import Path

import tiktoken

from support.checkpoint import Finder, read_sizes
from support.device import is_first
from support.files import json_object, read_json, replacing, write_json
from support.flags import InputError, in_a_line
from support.run import run_flags

MAIN_FILES = ("tokenizer.json", "vocab.json")       # a folder with one of them has a tokenizer
OTHER_FILES = ("merges.txt", "added_tokens.json", "tokenizer_config.json",
               "special_tokens_map.json", "chat_template.jinja")


def read_tokenizer(name):
    """Returns the tokenizer of this name. InputError if there is none, or no network."""
    name = tokenizer_name(name)
    return FolderTokenizer(name) if name.endswith("/") else tiktoken_encoding(name)


def tokenizer_name(name):
    """Returns the name of the tokenizer that --tokenizer means: a word, or a folder, or a file in
    it."""
    if name in ("tinytldr", *tiktoken.list_encoding_names()) or name.endswith("/"):
        return name
    if os.path.basename(name) in MAIN_FILES:
        name = os.path.dirname(name) or "."
    return f"{name}/" if os.path.isdir(name) else name


def tiktoken_encoding(name):
    """Returns a tiktoken.Encoding, downloaded on first use. InputError if there is none, or no
    network."""
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise InputError(f"--tokenizer: there is no encoding {name!r}; use tinytldr, gpt2, another "
                         "name that tiktoken knows, or the folder of a model") from error
    except Exception as error:     # it downloads through whatever raises here
        raise InputError(f"--tokenizer: tiktoken could not download its {name!r} encoding "
                         f"({type(error).__name__}); on a machine without network, point "
                         "TIKTOKEN_CACHE_DIR at a copy of its cache") from error


def known_tokenizer(model):
    """Returns the name of the tokenizer that a model was trained with, as its run says, or that is
    in files next to it; None if there is neither. model: a folder or hub name."""
    name = run_flags(model).get("tokenizer")
    if isinstance(name, str) and not name.endswith("/"):
        return name
    find = Finder(model)
    if any(find.optional(filename) for filename in MAIN_FILES):
        return model.rstrip("/") + "/"
    return None


def own_tokenizer(model, data=None):
    """Returns the name of the tokenizer that a model reads. A model that has none is taken for a
    GPT-2, or for a model of tinytldr where --data is, which is printed. InputError if that can't
    be."""
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
    if is_first():
        print(f"{model}: no tokenizer there; it is taken to read the tokens of {name}")
    return name


class FolderTokenizer:
    """Reads a model's own tokenizer, by Hugging Face's `tokenizers`, and has what is used here of a
    tiktoken.Encoding. Special tokens that are written in a text are read as text.

    name: a folder or hub name and "/". files: {file name: bytes}, for a copy next to what is
    trained. eot_token: the token that ends a text.
    """

    def __init__(self, name):
        find = Finder(name.rstrip("/") or "/")
        self.name, self.files = name, {}
        for filename in MAIN_FILES + OTHER_FILES:
            path = find.optional(filename)
            if path is not None:
                with open(path, "rb") as file:
                    self.files[filename] = file.read()
        if not set(MAIN_FILES) & set(self.files):
            raise InputError(f"{name}: no tokenizer in this folder (no tokenizer.json, no "
                             "vocab.json)")
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(f"{name}: reading a model's own tokenizer needs the package "
                             "tokenizers: pip install tokenizers") from error
        try:
            if "tokenizer.json" in self.files:
                self.tokenizer = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
            else:
                self.tokenizer = self._from_vocabulary(tokenizers)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.tokenizer.encode_special_tokens = True     # as ordinary text
            self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        except InputError:
            raise
        except Exception as error:      # a damaged file raises many kinds
            raise InputError(f"{name}: unreadable tokenizer: {in_a_line(error)}") from error
        if getattr(self.tokenizer.model, "dropout", None):
            self.tokenizer.model.dropout = None             # the same text, the same tokens
        self.n_vocab = max(self.vocabulary.values(), default=-1) + 1
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items() if token.special}
        self.eot_token = self._end_of_text(find)
        self.special[self.eot_token] = self.decode([self.eot_token])

    def _settings(self, filename):
        """Returns the JSON object in one of the files; {} if there is none."""
        return json_object(self.files.get(filename, b"{}"), self.name + filename)

    def _from_vocabulary(self, tokenizers):
        """Makes GPT-2's kind of tokenizer, byte-level BPE, from vocab.json and merges.txt."""
        if "merges.txt" not in self.files:
            raise InputError(f"{self.name}: vocab.json is there, but no merges.txt")
        settings = self._settings("tokenizer_config.json")
        lines = self.files["merges.txt"].decode("utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines
                  if line.strip() and not line.startswith("#version")]
        model = tokenizers.models.BPE(self._settings("vocab.json"), merges)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
            add_prefix_space=bool(settings.get("add_prefix_space", False)))
        tokenizer.decoder = tokenizers.decoders.ByteLevel()

        added = {number: text for text, number in self._settings("added_tokens.json").items()}
        special = set(map(text_of, self._settings("special_tokens_map.json").values()))
        for number, token in settings.get("added_tokens_decoder", {}).items():
            added[int(number)] = text_of(token)
            special |= {text_of(token)} if token.get("special") else set()
        for number, text in sorted(added.items()):
            if tokenizer.token_to_id(text) is None:
                token = tokenizers.AddedToken(text, special=text in special, normalized=False)
                tokenizer.add_tokens([token])
            if tokenizer.token_to_id(text) != number:
                raise InputError(f"{self.name}: the added token {text!r} has the number {number}, "
                                 "which does not follow those of vocab.json")
        return tokenizer

    def _end_of_text(self, find):
        """Returns the token that ends a text: the tokenizer's eos_token, or <|endoftext|>, or the
        model's eos_token_id. Says so where the model has another one than its tokenizer."""
        of_tokenizer = self.vocabulary.get(END_OF_TEXT)
        for filename in ("special_tokens_map.json", "tokenizer_config.json"):
            text = text_of(self._settings(filename).get("eos_token"))
            if text is not None and text not in self.vocabulary:
                raise InputError(f"{self.name}{filename}: its eos_token, {text!r}, is no token of "
                                 "this tokenizer")
            of_tokenizer = self.vocabulary.get(text, of_tokenizer)
        of_model = None
        for filename in ("generation_config.json", "config.json"):
            path = find.optional(filename)
            if path is not None:
                settings = read_json(path)
                of_model = settings.get("eos_token_id", of_model)
        # A config.json has GPT-2's 50256 by default, whatever it is in another vocabulary.
        by_default = of_model == 50256 and of_model not in self.special
        if type(of_model) is not int or not 0 <= of_model < self.n_vocab or by_default:
            of_model = None
        if of_tokenizer is None and of_model is None:
            raise InputError(f"{self.name}: which token ends a text? Give tokenizer_config.json an "
                             "eos_token")
        if of_tokenizer is None:
            return of_model
        if of_model not in (None, of_tokenizer):
            print(f"{self.name}: a text ends in token {of_tokenizer}, the tokenizer's eos_token, "
                  f"and not in {of_model}, the model's eos_token_id")
        return of_tokenizer

    @property
    def special_tokens_set(self):
        return set(self.special.values())

    def encode_ordinary(self, text):
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts, num_threads=None):
        """Returns lists of token ids, one for each text. `tokenizers` chooses the number of
        threads."""
        try:
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:      # it has no type of its own
            raise InputError(f"{self.name}: the tokenizer can't read all text: "
                             f"{in_a_line(error)}") from error
        return [text_encoding.ids for text_encoding in encoded]

    def decode(self, tokens):
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


MAX_WHITE_SPACE = 500_000       # characters in a row; tiktoken gives up at about a million


def encode_text(text, tokenizer):
    """Returns the token ids of a text, in which special tokens are ordinary text. ValueError if the
    tokenizer can't read it."""
    if len(text) > MAX_WHITE_SPACE:
        longest = max(map(len, re.findall(r"\s+", text)), default=0)
        if longest > MAX_WHITE_SPACE:
            raise ValueError(f"{longest:,} characters of white space in a row; the tokenizer reads "
                             f"{MAX_WHITE_SPACE:,} at most")
    try:
        return tokenizer.encode_ordinary(text)
    except BaseException as error:      # tiktoken's is no Exception, and has no name to import
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizer can't read this text; is it very long and without "
                         "spaces?") from None


def to_text(response, tokenizer):
    """Returns a sample as text, without its end-of-text token, and without ids that only a
    vocabulary padded beyond the tokenizer's has."""
    return tokenizer.decode([token for token in response
                             if token != tokenizer.eot_token and token < tokenizer.n_vocab])


def special_tokens(tokenizer):
    """Returns the texts of a tokenizer's special tokens, such as "<|endoftext|>", as a list."""
    return sorted(tokenizer.special_tokens_set)


END_OF_TEXT = "<|endoftext|>"
SPLIT_INTO_WORDS = r" ?[A-Za-z']+| ?[^\sA-Za-z']+|\s"     # all characters: any text round-trips


def word_encoding(name, texts):
    """Returns a tiktoken.Encoding of the 256 bytes, then every word of the texts (with and without
    a space before it) as one token, then the end of text. Other text falls back to bytes."""
    pieces = {piece for text in texts for piece in re.findall(SPLIT_INTO_WORDS, text)}
    pieces |= {" " + piece for piece in pieces if not piece.startswith(" ")}
    words = [bytes([b]) for b in range(256)]
    words += sorted(piece.encode() for piece in pieces if len(piece.encode()) > 1)
    return tiktoken.Encoding(name=name, pat_str=SPLIT_INTO_WORDS,
                             mergeable_ranks={word: rank for rank, word in enumerate(words)},
                             special_tokens={END_OF_TEXT: len(words)})


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


def same_tokens(tokenizer, other):
    """Returns whether each number means the same text in two tokenizers, and the same one ends a
    text."""
    return (vocabulary(tokenizer) == vocabulary(other)
            and tokenizer.eot_token == other.eot_token)


def vocabulary(tokenizer):
    """Returns {token as tokenizer.json writes it: number}."""
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.vocabulary
    letters = byte_letters()
    words = {"".join(letters[byte] for byte in word): number
             for word, number in tokenizer._mergeable_ranks.items()}
    return words | tokenizer._special_tokens


def check_same_tokenizer(what, model, tokenizer):
    """Raises InputError if a model reads other tokens than a tokenizer's. what: the beginning of
    the message; model: a folder. Two encodings are compared by name, all else by content. Of a
    model without a tokenizer, and of which no run tells, nothing is known."""
    name = run_flags(model).get("tokenizer")
    if name is None and known_tokenizer(model) is None:
        print(f"{what} has no tokenizer; it is taken to read the policy's tokens")
        return
    by_content = not isinstance(name, str) or name.endswith("/") or tokenizer.name.endswith("/")
    if by_content:
        name = model.rstrip("/") + "/"
        equal = same_tokens(tokenizer, FolderTokenizer(name))
    else:
        equal = name == tokenizer.name
    if not equal:
        raise InputError(f"{what} reads {name} tokens, the policy {tokenizer.name} tokens")


def check_same_tokens(what, model, config, policy_config, tokenizer):
    """Raises InputError if a model can't read what the policy writes: another tokenizer, a smaller
    vocabulary, shorter texts. what: the beginning of the message; model: its folder; config,
    policy_config: a GPTConfig each; tokenizer: the policy's."""
    check_same_tokenizer(what, model, tokenizer)
    for name in ("vocab_size", "block_size"):
        size, needed = getattr(config, name), getattr(policy_config, name)
        if size < needed:
            raise InputError(f"{what} has {name} {size}, the policy {needed}")


def save_tokenizer(directory, tokenizer, block_size):
    """Writes a tokenizer next to a model: its own files, as they are; a tiktoken.Encoding as
    tokenizer.json and tokenizer_config.json, so that `transformers` reads and writes the same
    tokens with a saved model.

    tiktoken merges two neighbours if together they are a token, those with the lowest rank first;
    tokenizer.json lists pairs to merge, the first ones first: so every way to cut a token in two
    tokens is such a pair.
    """
    if not is_first():
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
