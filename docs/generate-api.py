#!/usr/bin/env python3
"""Writes the calls, bodies, answers and errors of docs/api.md from the daemon's own OpenAPI document.

    docs/generate-api.py [--check] CLADE

CLADE is the program: it prints its document. The part between the two markers of docs/api.md is generated, the text
before it is not. `--check` writes nothing, and fails if the generated part differs. Either fails if a path belongs to
no group, or a kind of error has no row.
"""

import json
import pathlib
import re
import subprocess
import sys

FILE = pathlib.Path(__file__).resolve().parent / "api.md"
BEGIN = "<!-- Generated from the OpenAPI document by docs/generate-api.py: do not edit below. -->"
END = "<!-- End of the generated part. -->"
# Groups of calls: heading, paths.
GROUPS = (
    ("The supervisor", r"/v1/(supervisor|ended|events)|/metrics|/openapi\.json"),
    ("VMs of the directory", r"/v1/(vms|names|restore)"),
    ("State of a VM", r"/v1/vms/\{name\}(/(stats|logs|touched|pages|page-map))?"),
    ("Run, reset, suspend, stop", r"/v1/vms/\{name\}/(pause|resume|reset|rollback|suspend|suspend-after|wake|ttl|stop)"),
    ("Forks and snapshots of a VM", r"/v1/vms/\{name\}/(fork|ready|checkpoint|snapshot|working-set)"),
    ("Memory and devices of a VM", r"/v1/vms/\{name\}/(memory|console|network|balloon)"),
    ("Checkpoints", r"/v1/checkpoints(/.*)?"),
    ("Sessions of the page", r"/v1/session"),
)
KIND = re.compile(r"`([a-z-]+)`: (.*?)(?= `[a-z-]+`: |$)")
# Values of fields that are absent. The document names only other defaults.
ABSENT = {"boolean": "false", "integer": "0", "number": "0", "string": '""', "array": "[]", "object": "{}"}
LONGEST_PATTERN = 60


def document(program):
    """The document of the API that a daemon of this program has."""
    return json.loads(subprocess.run([program, "openapi"], check=True, stdout=subprocess.PIPE).stdout)


def cell(text):
    """A text on one line, in a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def code(value):
    return f"`{value}`"


def row(*cells):
    return "| " + " | ".join(cells) + " |\n"


def table(*heads):
    return row(*heads) + "|" + "---|" * len(heads) + "\n"


def either(values):
    """Words with commas, and `or` before the last."""
    *most, last = values
    return f"{', '.join(most)} or {last}" if most else last


def ref(schema):
    """The name of the schema that another refers to."""
    return schema["$ref"].rsplit("/", 1)[1] if "$ref" in schema else None


def described(schema):
    """The description of a field, which may stand beside a reference in an alternative."""
    inner = (one["description"] for one in schema.get("oneOf", []) if "description" in one)
    return schema.get("description") or next(inner, "")


class Api:
    def __init__(self, found):
        self.schemas = found["components"]["schemas"]
        calls = [(path, method, call) for path, item in found["paths"].items() for method, call in item.items()]
        self.groups = [(title, [one for one in calls if re.fullmatch(paths, one[0])]) for title, paths in GROUPS]
        for path, method, _ in calls:
            if sum(path == other for _, group in self.groups for other, of, _ in group if of == method) != 1:
                raise SystemExit(f"{path} belongs to no group of calls, or to several: change GROUPS")
        # Each call's kinds of errors, and those of all calls.
        self.titles, self.kinds = {}, {}
        for path, method, call in calls:
            kinds = self.kinds[method, path] = set()
            for status, answer in call["responses"].items():
                for kind, title in KIND.findall(answer["description"]) if status != "200" else ():
                    kinds.add((status, kind))
                    self.titles[status, kind] = title
        self.common = set.intersection(*self.kinds.values())
        self.slugs = [urn.rsplit(":", 1)[1] for urn in self.schemas["Problem"]["properties"]["type"]["enum"]]
        self.titles = dict(sorted(self.titles.items(), key=lambda one: (one[0][0], self.slugs.index(one[0][1]))))

    def type(self, schema, is_body):
        """A type in words, for a body with its bounds."""
        name = ref(schema)
        if name:
            values = self.schemas[name].get("enum")
            if values:
                return either([code(value) for value in values])
            return f"[{code(name)}](#{name.lower()})" if is_body else code(name)
        for key in ("oneOf", "anyOf", "allOf"):
            if key in schema:
                return either(sorted((self.type(one, is_body) for one in schema[key]), key=lambda one: one == "null"))
        kind = schema.get("type", "any")
        if isinstance(kind, list):
            return either([self.type({**schema, "type": one}, is_body) for one in kind])
        if kind == "array":
            if "prefixItems" in schema:
                return f"({', '.join(self.type(item, is_body) for item in schema['prefixItems'])})"
            most = f"at most {schema['maxItems']:,} " if is_body and "maxItems" in schema else ""
            inner = self.type(schema["items"], is_body)
            return f"list of {most}{inner}" + ("s" if inner in ABSENT else "")
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            return f"object of {self.type(schema['additionalProperties'], is_body)}s"
        return kind + (self.bounds(kind, schema) if is_body else "")

    @staticmethod
    def bounds(kind, schema):
        """The bounds of a plain type."""
        least, most, what = schema.get("minimum"), schema.get("maximum"), ""
        if kind == "string":
            least, most, what = schema.get("minLength"), schema.get("maxLength"), " characters"
        elif kind not in ("integer", "number"):
            return ""
        text = ""
        if most is not None:
            text = f", {least or 0:,} to {most:,}{what}"
        elif least:
            text = f", {least:,}{what} or more"
        text += f", a multiple of {schema['multipleOf']:,}" if "multipleOf" in schema else ""
        pattern = schema.get("pattern") if kind == "string" else None
        return text + (f", {code(cell(pattern))}" if pattern and len(pattern) < LONGEST_PATTERN else "")

    def default(self, schema, is_required):
        """The value of a field that is absent; empty where the document has no word of it."""
        if is_required:
            return "required"
        if "default" in schema:
            return code(json.dumps(schema["default"]))
        name = ref(schema)
        if name:
            return "" if "enum" in self.schemas[name] else code("{}")
        if "null" in schema.get("type", ()) or any(one.get("type") == "null" for one in schema.get("oneOf", [])):
            return code("null")
        return code(ABSENT[schema["type"]])

    def body(self, name):
        """A heading and the fields of a body or of a part of one."""
        schema = self.schemas[name]
        out = f"#### {name}\n\n{' '.join(schema.get('description', '').split())}\n\n"
        if "properties" not in schema:
            examples = either([code(example) for example in schema.get("examples", [])])
            return out + f"A {schema['type']}, such as {examples}.\n\n"
        out += table("field", "type", "default", "meaning")
        for field, value in schema["properties"].items():
            about = cell(described(value)) + (" Deprecated." if value.get("deprecated") else "")
            default, kind = self.default(value, field in schema.get("required", [])), self.type(value, True)
            kind = kind.removesuffix(" or null") if default == code("null") else kind
            out += row(code(field), kind, default, about)
        return out + "\n"

    def named(self, schema):
        """The schemas below one that have a heading or a row of their own, in order."""
        names = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema))
        return [name for name in dict.fromkeys(names) if "enum" not in self.schemas[name]]

    def below(self, names):
        """These schemas, and those that they are made of."""
        found = list(dict.fromkeys(names))
        for name in found:
            found += [one for one in self.named(self.schemas[name]) if one not in found]
        return found

    def errors(self, method, path):
        """Kinds of errors of a call, without those of all calls."""
        own, out = self.kinds[method, path] - self.common, []
        for status in sorted({status for status, _ in own}):
            all_of = {one for one in self.titles if one[0] == status} - self.common
            kinds = [code(kind) for of, kind in self.titles if (of, kind) in own and of == status]
            out.append(status if all_of <= own and len(kinds) != 1 else f"{status} {', '.join(kinds)}")
        return "; ".join(out)

    def group(self, title, calls, seen):
        """A table of calls, one of their parameters, and the bodies that no earlier group has."""
        out = f"### {title}\n\n" + table("call", "effect", "body", "answer", "errors")
        parameters, bodies = "", []
        for path, method, call in calls:
            name = f"{method.upper()} {path}"
            body, content = call.get("requestBody"), ""
            if body:
                (kind, value), = body["content"].items()
                content = self.type(value["schema"], True) if kind == "application/json" else f"bytes, {code(kind)}"
                content = content.replace(" or null", ", optional")
                bodies += self.named(value["schema"])
            for one in call.get("parameters", []):
                if one["in"] == "header":
                    content = f"{content}; {code(one['name'])}".removeprefix("; ")
                elif one["in"] == "query":
                    kind, default = self.type(one["schema"], True), "required" if one.get("required") else ""
                    parameters += row(code(name), code(one["name"]), kind, default, cell(one["description"]))
            (kind, value), = call["responses"]["200"]["content"].items()
            answer = self.type(value["schema"], False) if kind == "application/json" else code(kind)
            out += row(code(name), cell(call["summary"]), content, answer, self.errors(method, path))
        out += "\n"
        if parameters:
            out += table("call", "parameter", "type", "default", "meaning") + parameters + "\n"
        for name in dict.fromkeys(bodies):
            if name not in seen:
                seen.append(name)
                out += self.body(name)
        return out

    def parts(self, seen):
        """The schemas that bodies are made of."""
        out = "### Parts of bodies\n\n"
        for name in self.below(seen):
            out += "" if name in seen else self.body(name)
        return out

    def fields(self, schema):
        """The fields of an answer."""
        required = schema.get("required", [])
        properties = schema.get("properties", {}).items()
        return ", ".join(
            f"{code(field)}{'' if field in required else '?'} {self.type(value, False)}" for field, value in properties
        )

    def content(self, schema):
        """The content of an answer or of a part of one."""
        if "allOf" in schema:
            parts = (f"all of {code(ref(one))}" if ref(one) else self.fields(one) for one in schema["allOf"])
            return ", ".join(parts)
        if "oneOf" in schema:
            kinds = []
            for one in schema["oneOf"]:
                fields = [code(field) for field in one["properties"] if field != "kind"]
                kinds.append(code(one["properties"]["kind"]["enum"][0]) + (f" ({', '.join(fields)})" if fields else ""))
            return "`kind` " + ", ".join(kinds)
        return self.fields(schema)

    def answers(self):
        """A row for each schema of an answer."""
        names = []
        for _, calls in self.groups:
            for _, _, call in calls:
                names += self.named(call["responses"]["200"]["content"])
        out = "### Answers\n\n`?` marks fields that may be absent.\n\n" + table("type", "content", "fields")
        for name in sorted(self.below(names)):
            schema = self.schemas[name]
            fields = self.content(schema) if {"properties", "allOf", "oneOf"} & schema.keys() else schema["type"]
            out += row(code(name), cell(schema.get("description")), fields)
        return out + "\n"

    def problems(self, written):
        """A row for each kind of error of a call. Those of no call stand in the hand-written text."""
        out = "### Kinds of errors\n\n" + table("status", "`type`", "meaning", "calls")
        for (status, kind), title in self.titles.items():
            out += row(status, code(kind), cell(title), "all" if (status, kind) in self.common else "as listed")
        for kind in self.slugs:
            if not re.search(rf"^\| \d+ \| `{kind}` \|", out + written, re.M):
                raise SystemExit(f"no call has the error {kind}: give it a row in the text of {FILE.name}")
        return out

    def text(self, written):
        """The generated part."""
        seen = []
        out = "".join(self.group(title, calls, seen) for title, calls in self.groups)
        return out + self.parts(seen) + self.answers() + self.problems(written)


def main():
    args = [arg for arg in sys.argv[1:] if arg != "--check"]
    if len(args) != 1:
        raise SystemExit(__doc__)
    was = FILE.read_text()
    written, begin, rest = was.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{FILE} lacks a marker: {END if begin else BEGIN}")
    text = f"{written}{begin}\n\n{Api(document(args[0])).text(written + after)}\n{end}{after}"
    if "--check" not in sys.argv:
        FILE.write_text(text)
    elif was != text:
        raise SystemExit(f"{FILE} differs from the OpenAPI document: run docs/generate-api.py")


main()
