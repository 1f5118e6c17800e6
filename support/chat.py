"""Turns chat messages into text, cut into segments that are learnt or only read.

A model's own chat template renders messages, as it does in `transformers`. Models without one get
the layout of Anthropic's HH dialogues: "Human: ..." and "Assistant: ...", each after an empty line.
A *segment* is (text, learnt). What the assistant says in a response is learnt. What a person or a
tool says between two of its turns is context, which the model reads but does not learn to write.
"""
import datetime
import functools
import json
import re
from itertools import chain

ROLES = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System",
         "tool": "Tool"}            # as messages have them, and as HH's layout names them
HH_SOURCE = ("{% for message in messages %}{{ '\n\n' + names[message['role']] + ': ' + "
             "message['content'] }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")
PERSON = r"\n\n(?:Human|System):.*?(?:\n\nAssistant:|\Z)"      # in a dialogue in text
MARK = "\ufdd0"         # a character that no text has; see ChatTemplate.guard
# The date that templates are given: the default of Llama 3's. With the real one, two runs on
# different days would read different tokens.
A_DAY = datetime.date(2024, 7, 26)

# ------------------------------------------------------------------ templates


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


def template_of(tokenizer):
    """Returns the chat template of a tokenizer, or HH's layout."""
    return getattr(tokenizer, "template", HH)


# ------------------------------------------------------------------ segments


def segments_of(row, tokenizer):
    """Turns a row into segments. Returns (the prompt's text, [segments of each response]), where
    segments are lists of (text, learnt). ValueError if the chat template does not take the row."""
    prompt, responses = row["prompt"], row["responses"]
    if isinstance(prompt, str):
        return prompt, [text_segments(prompt, response) for response in responses]
    template = template_of(tokenizer)
    thinking = any(message.get("reasoning_content") or "</think>" in message["content"]
                   for message in chain(*responses))
    rendered = [chat_segments(template, prompt, response, thinking) for response in responses]
    if any(text != rendered[0][0] for text, _ in rendered):
        raise ValueError("the chat template writes the prompt in another way for each response")
    return rendered[0][0], [segments for _, segments in rendered]


def text_segments(prompt, response, context=PERSON):
    """Cuts a response that is text into segments. If its prompt ends in "Assistant:", as an HH
    dialogue does, then what a person says later in the response is context. context: a regular
    expression for that, without groups."""
    if not prompt.endswith("\n\nAssistant:"):
        return [(response, True)]
    pieces = re.split(f"({context})", response, flags=re.S)
    parts = [(text, i % 2 == 0) for i, text in enumerate(pieces)]
    if len(parts) > 1 and not parts[-1][0]:     # a person has the last word: no reply follows
        parts = parts[:-2]
    return [(text, learnt) for text, learnt in parts if text]


def chat_segments(template, prompt, response, thinking=False):
    """Renders a prompt and a response, lists of messages, by a chat template. Returns (the prompt's
    text, [(text, learnt), ...]).

    The response begins with a turn of the assistant, or continues the one with which the prompt
    ends. White space around a reply is taken off: a reply's first token could merge with the new
    line before it. The response ends where the template ends its last turn; the new line that
    templates write after that is dropped. thinking: see ChatTemplate.render.
    """
    prompt = [template.guard(message) for message in prompt]
    response = [template.guard(message) for message in response]
    begun = ""                              # the part of the first turn that the prompt holds
    if prompt[-1]["role"] == "assistant":
        *prompt, last = prompt
        begun = last["content"].strip()
        response[0] = {**last, **response[0],
                       "content": last["content"] + response[0]["content"]}
    response = [{**message, "content": message["content"].strip()}
                if message["role"] == "assistant" else message for message in response]
    dialogue = prompt + response
    turns = []                              # where each of the assistant's turns begins and ends
    for i in range(len(prompt), len(dialogue)):
        if dialogue[i]["role"] == "assistant":
            head = template.render(dialogue[:i], True, thinking)
            tail = template.render(dialogue[:i + 1], False, thinking).rstrip()
            if begun and not turns:
                head = tail[:tail.find(begun, len(head)) + len(begun)]
            turns.append((head, tail))
    whole = turns[-1][1]
    segments, end = [], len(turns[0][0])
    for head, tail in turns:
        if not (whole.startswith(tail) and tail.startswith(head)):
            raise ValueError(
                "the chat template writes a turn of the assistant in another way than it asks for "
                "it, or in another way when the dialogue goes on; end the response at its first "
                "turn, or put the earlier turns into the prompt")
        segments += [(whole[end:len(head)], False), (whole[len(head):len(tail)], True)]
        end = len(tail)
    return turns[0][0], [(text, learnt) for text, learnt in segments if text]
