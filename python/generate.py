#!/usr/bin/env python3
"""Writes the client's types and calls from the daemon's own OpenAPI document.

    python/generate.py [--check] CLADE

CLADE is the program: it is asked for its document. `--check` writes nothing, and fails if what is there
is not what would be written.
"""

import json
import keyword
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent / "src" / "clade"
HEAD = '"""Generated from the daemon\'s OpenAPI document by `python/generate.py`: do not edit."""\n\n'
# Not calls with an answer that ends, or not for this client.
OTHERS = {"events", "follow_console", "scrape", "openapi_document", "log_in", "log_out", "show_session"}
PLAIN = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


def document(program):
    """The document of the API that a daemon of this program has."""
    return json.loads(subprocess.run([program, "openapi"], check=True, stdout=subprocess.PIPE).stdout)


def words(text, indent):
    """A docstring of `text`, without what Markdown marks."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace('"""', "'''")
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) + 1 > 96 - indent and line:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    lines.append(line)
    pad = " " * indent
    if len(lines) == 1:
        return f'{pad}"""{lines[0]}"""\n'
    return f'{pad}"""' + f"\n{pad}".join(lines) + f'\n{pad}"""\n'


def annotation(schema):
    """The Python type of a schema that stands in another."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "enum" in schema:
        return f"Literal[{', '.join(json.dumps(value) for value in schema['enum'])}]"
    if "const" in schema:
        return f"Literal[{json.dumps(schema['const'])}]"
    for key in ("oneOf", "anyOf"):
        if key in schema:
            kinds = [annotation(one) for one in schema[key]]
            return " | ".join(sorted(dict.fromkeys(kinds), key=lambda kind: kind == "None"))
    if "allOf" in schema and len(schema["allOf"]) == 1:
        return annotation(schema["allOf"][0])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(annotation({**schema, "type": one}) for one in kind)
    if kind == "array":
        if "prefixItems" in schema:
            return f"tuple[{', '.join(annotation(item) for item in schema['prefixItems'])}]"
        return f"list[{annotation(schema['items'])}]" if "items" in schema else "list[Any]"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"dict[str, {annotation(values)}]" if isinstance(values, dict) else "dict[str, Any]"
    return PLAIN.get(kind, "Any")


def typed_dict(name, schema, bases=()):
    """A class for an object."""
    out = f"class {name}({', '.join(bases) or 'TypedDict'}):\n"
    out += words(schema.get("description") or name, 4)
    required = schema.get("required", [])
    for field, value in sorted(schema.get("properties", {}).items()):
        kind = annotation(value)
        kind = kind if field in required else f"NotRequired[{kind}]"
        if not field.isidentifier() or keyword.iskeyword(field):
            raise SystemExit(f"{name}.{field} is no name in Python")
        out += f"\n    {field}: {kind}\n"
        about = value.get("description") or next(
            (one["description"] for one in value.get("oneOf", []) if "description" in one), None
        )
        out += words(about, 4) if about else ""
    return out + "\n\n"


def type_of(name, schema):
    """What a named schema is in Python."""
    if "allOf" in schema:
        bases = [one["$ref"].rsplit("/", 1)[1] for one in schema["allOf"] if "$ref" in one]
        own = {"description": schema.get("description", name), "properties": {}, "required": []}
        for one in schema["allOf"]:
            own["properties"] |= one.get("properties", {})
            own["required"] += one.get("required", [])
        return typed_dict(name, own, bases)
    if "oneOf" in schema:
        out, kinds = "", []
        for one in schema["oneOf"]:
            tag = one.get("properties", {}).get("kind", {}).get("enum", [None])[0]
            if tag is None:
                kinds.append(annotation(one))
                continue
            kinds.append(name + "".join(word.title() for word in re.split("[-_]", tag)))
            out += typed_dict(kinds[-1], one)
        return f"{out}{name} = {' | '.join(dict.fromkeys(kinds))}\n\n\n"
    if schema.get("type") == "object" and "properties" in schema:
        return typed_dict(name, schema)
    return f"{name} = {annotation(schema)}\n\n\n"


def types(schemas):
    """All types, each after those that it is made of: aliases need theirs."""
    done, out = {}, ""

    def add(name):
        if name in done:
            return
        done[name] = None
        for other in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schemas[name])):
            add(other)
        done[name] = type_of(name, schemas[name])

    for name in sorted(schemas):
        add(name)
    order = sorted(done, key=lambda name: list(done).index(name))
    finished = []

    def finish(name, seen=()):
        if name in finished or name in seen:
            return
        for other in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schemas[name])):
            finish(other, (*seen, name))
        finished.append(name)

    for name in order:
        finish(name)
    out = HEAD + "from __future__ import annotations\n\nfrom typing import Any, Literal, NotRequired, TypedDict\n\n\n"
    out += "".join(done[name] for name in finished)
    return out.rstrip() + "\n"


def call(path, method, operation, is_async):
    """One call."""
    parameters = {(one["in"], one["name"]): one for one in operation.get("parameters", [])}
    args, query, headers = ["self"], [], []
    for place, name in parameters:
        if place == "path":
            args.append(f"{name}: str")
    body, content = operation.get("requestBody"), None
    if body:
        (content, value), = body["content"].items()
        if content == "application/json":
            kind, is_needed = annotation(value["schema"]), body.get("required")
            needed = " | ".join(f"t.{one}" if one[0].isupper() else one for one in kind.split(" | ") if one != "None")
            args.append(f"body: {needed}" if is_needed else f"body: {needed} | None = None")
        else:
            args.append("body: bytes")
    named = []
    for (place, name), one in parameters.items():
        python = name.lower().replace("-", "_")
        python += "_" if keyword.iskeyword(python) else ""
        if place == "query":
            kind = annotation(one["schema"]).removesuffix(" | None")
            named.append(f"{python}: {kind}" if one.get("required") else f"{python}: {kind} | None = None")
            query.append(f'"{name}": {python}')
        elif place == "header":
            named.append(f"{python}: str | None = None")
            headers.append(f'"{name}": {python}')
    args += ["*", *named] if named else []
    (answer, value), = list(operation["responses"]["200"]["content"].items())[:1]
    is_bytes = answer == "application/octet-stream"
    kind = "bytes" if is_bytes else re.sub(r"\b([A-Z]\w+)", r"t.\1", annotation(value["schema"]))
    kind = kind.replace("t.Any", "Any")
    path = re.sub(r"\{(\w+)\}", r"{quote(\1, safe='')}", path)
    text = f'f"{path}"' if "{" in path else f'"{path}"'
    more = [method.upper().join('""'), text]
    more += [f"body={'body' if body else None}"] if body else []
    more += [f"query={{{', '.join(query)}}}"] if query else []
    more += [f"headers={{{', '.join(headers)}}}"] if headers else []
    verb, wait = ("async def", "await ") if is_async else ("def", "")
    out = f"    {verb} {operation['operationId']}({', '.join(args)}) -> {kind}:\n"
    out += words(operation.get("summary") or operation["operationId"], 8)
    ask = "data" if is_bytes else "json"
    result = f"{wait}self._transport.{ask}({', '.join(more)})"
    out += f"        return {result}\n\n" if is_bytes else f"        answer: {kind} = {result}\n        return answer\n\n"
    return out


def calls(paths):
    """A class of calls, and one of the same that are awaited."""
    out = HEAD + "from __future__ import annotations\n\nfrom typing import Any\nfrom urllib.parse import quote\n\n"
    out += "from . import types as t\nfrom ._transport import AsyncTransport, Transport\n\n\n"
    for name, transport, is_async in (("Calls", "Transport", False), ("AsyncCalls", "AsyncTransport", True)):
        waits = " Each is awaited." if is_async else ""
        out += f'class {name}:\n    """Every call of the daemon\'s API that has one answer.{waits}"""\n\n'
        out += f"    def __init__(self, transport: {transport}) -> None:\n        self._transport = transport\n\n"
        for path, item in sorted(paths.items()):
            for method, operation in sorted(item.items()):
                if operation["operationId"] not in OTHERS:
                    out += call(path, method, operation, is_async)
        out = out.rstrip() + "\n\n\n"
    return out.rstrip() + "\n"


def errors(problem):
    """A class for each kind of error."""
    out = HEAD + "from ._error import CladeError\n\n\n"
    kinds = {}
    for urn in sorted(problem["properties"]["type"]["enum"]):
        slug = urn.rsplit(":", 1)[1]
        name = "".join(word.title() for word in slug.split("-")) + "Error"
        kinds[slug] = name
        out += f'class {name}(CladeError):\n    """The kind `{slug}`."""\n\n\n'
    out += "KINDS: dict[str, type[CladeError]] = {\n"
    out += "".join(f'    "{slug}": {name},\n' for slug, name in kinds.items())
    return out + "}\n"


def main():
    args = [arg for arg in sys.argv[1:] if arg != "--check"]
    if len(args) != 1:
        raise SystemExit(__doc__)
    found = document(args[0])
    schemas = found["components"]["schemas"]
    written = {"types.py": types(schemas), "_calls.py": calls(found["paths"]), "errors.py": errors(schemas["Problem"])}
    for name, text in written.items():
        path = HERE / name
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise SystemExit(f"{path} is not what the document says: run python/generate.py")


main()
