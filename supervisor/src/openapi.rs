//! The OpenAPI document of the supervisor's socket: its own routes, and those forwarded to VMs.
//!
//! Routes, bodies and answers come from the handlers. Common parts are added here: the parameters
//! of paths, the errors, and the authorization of clients.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use utoipa::PartialSchema;
use utoipa::openapi::OpenApi;

use super::idempotency::{MAX_KEY, is_idempotent};
use clade_api::http::PROBLEM_TYPE;
use clade_api::{LONGEST_NAME, Problem, ProblemKind};

/// The document's name for the token.
const TOKEN: &str = "token";

/// Calls of the supervisor for a VM that wait for the VM's process.
const WAITING_CALLS: [&str; 8] =
    ["/fork", "/checkpoint", "/snapshot", "/rollback", "/network", "/suspend", "/stop", "/working-set"];

/// Paths of a document, with its operations by method.
type Paths = Map<String, Value>;

fn paths(document: &Value) -> Paths {
    document["paths"].as_object().cloned().unwrap_or_default()
}

/// Returns the methods and paths of `of_vms` that `own` lacks.
pub(super) fn passed_on(own: &OpenApi, of_vms: &OpenApi) -> Vec<(String, String)> {
    let value = |document| serde_json::to_value(document).unwrap_or_default();
    let (own, of_vms) = (value(own), value(of_vms));
    let mut all = Vec::new();
    for (path, item) in paths(&of_vms) {
        let methods = item.as_object().into_iter().flat_map(Map::keys);
        let others = methods.filter(|method| own["paths"][&path].get(method.as_str()).is_none());
        all.extend(others.map(|method| (method.to_uppercase(), path.clone())));
    }
    all
}

/// Returns the document.
pub(super) fn document(own: &OpenApi, of_vms: &OpenApi) -> Value {
    let value = |document| serde_json::to_value(document).unwrap_or_default();
    let (mut all, mut of_vms_value) = (value(own), value(of_vms));
    for (method, path) in passed_on(own, of_vms) {
        let method = method.to_lowercase();
        let mut operation = of_vms_value["paths"][&path][&method].take();
        complete(&mut operation, &method, &path, true);
        all["paths"][&path][&method] = operation;
    }
    for (path, item) in paths(&value(own)) {
        for method in item.as_object().into_iter().flat_map(Map::keys) {
            complete(&mut all["paths"][&path][method], method, &path, false);
        }
    }
    for (name, schema) in of_vms_value["components"]["schemas"].as_object().cloned().unwrap_or_default() {
        all["components"]["schemas"][&name] = schema;
    }
    all["components"]["schemas"]["Problem"] = problem();
    all["components"]["securitySchemes"][TOKEN] = json!({
        "type": "http",
        "scheme": "bearer",
        "description": "Over TCP. The Unix socket needs none: it is its user's alone.",
    });
    all["security"] = json!([{ TOKEN: [] }]);
    all["info"] = json!({
        "title": "Clade",
        "description": "The supervisor of a runtime directory: VMs, their forks, and checkpoints.",
        "version": env!("CARGO_PKG_VERSION"),
        "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
    });
    all
}

fn problem() -> Value {
    let mut schema = serde_json::to_value(Problem::schema()).unwrap_or_default();
    let urns: Vec<String> = ProblemKind::ALL.iter().map(|kind| kind.urn()).collect();
    schema["properties"]["type"]["enum"] = json!(urns);
    schema
}

/// Adds the parts common to many operations.
fn complete(operation: &mut Value, method: &str, path: &str, passed_on: bool) {
    let mut parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
    if path.contains("{name}") {
        parameters.push(json!({
            "name": "name",
            "in": "path",
            "required": true,
            "schema": name_schema(),
        }));
    }
    if is_idempotent(&method.to_uppercase(), path) {
        parameters.push(json!({
            "name": "Idempotency-Key",
            "in": "header",
            "required": false,
            "description": "The same key with the same body gets the first answer.",
            "schema": { "type": "string", "pattern": "^[!-~]+$", "minLength": 1, "maxLength": MAX_KEY },
        }));
    }
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    let mut by_status: BTreeMap<u16, Vec<ProblemKind>> = BTreeMap::new();
    for kind in errors(operation, method, path, passed_on) {
        by_status.entry(kind.status().as_u16()).or_default().push(kind);
    }
    for (status, kinds) in by_status {
        let texts: Vec<String> = kinds.iter().map(|kind| format!("`{}`: {}", kind.slug(), kind.title())).collect();
        let mut response = json!({
            "description": texts.join(" "),
            "content": { PROBLEM_TYPE: { "schema": { "$ref": "#/components/schemas/Problem" } } },
        });
        if status == 401 {
            response["headers"]["WWW-Authenticate"] = json!({ "schema": { "type": "string" } });
        }
        operation["responses"][status.to_string()] = response;
    }
}

fn name_schema() -> Value {
    let pattern = format!("^[A-Za-z0-9][A-Za-z0-9_.-]{{0,{}}}$", LONGEST_NAME - 1);
    json!({ "type": "string", "pattern": pattern, "minLength": 1, "maxLength": LONGEST_NAME })
}

/// Returns the possible errors of an operation.
fn errors(operation: &Value, method: &str, path: &str, passed_on: bool) -> Vec<ProblemKind> {
    use ProblemKind as Kind;
    let mut all = vec![
        Kind::BadRequest,
        Kind::Unauthorized,
        Kind::BadHost,
        Kind::LateBody,
        Kind::BodyTooLarge,
        Kind::Internal,
        Kind::NoThread,
        Kind::TooMany,
        Kind::Ending,
        Kind::ForeignOrigin,
        Kind::TooManyLogins,
    ];
    // The name is in the path, or in the body for a new VM or checkpoint.
    if path.contains("{name}") || method == "post" && matches!(path, "/v1/vms" | "/v1/restore" | "/v1/checkpoints") {
        all.push(Kind::BadName);
    }
    if path.starts_with("/v1/vms/{name}") {
        all.extend([Kind::NoSuchVm, Kind::VmGone]);
    }
    if path.starts_with("/v1/checkpoints/{name}") || path.ends_with("/rollback") {
        all.push(Kind::NoSuchCheckpoint);
    }
    // The supervisor passes a reset on as well.
    if passed_on || path.ends_with("/reset") {
        all.extend([Kind::Forbidden, Kind::VmSilent]);
    }
    let of_vm = path.strip_prefix("/v1/vms/{name}").is_some_and(|call| WAITING_CALLS.contains(&call));
    if method == "post" && (of_vm || path == "/v1/vms") {
        all.push(Kind::VmSilent);
    }
    if method == "post" {
        all.push(Kind::VmGone);
    }
    if method != "get" {
        let conflicts = Kind::ALL.iter().filter(|kind| kind.status().as_u16() == 409);
        all.extend(conflicts);
    } else if path == "/v1/checkpoints/{name}" {
        all.push(Kind::WrongState);
    } else if path.ends_with("/memory") {
        all.extend([Kind::WrongState, Kind::BadAddress]);
    } else if path.ends_with("/console") {
        all.push(Kind::NoDevice);
    } else if path.ends_with("/balloon") {
        all.extend([Kind::NoDevice, Kind::WrongState]);
    }
    if method == "put" && path.ends_with("/memory") {
        all.extend([Kind::BadAddress, Kind::MediaType]);
    } else if operation.get("requestBody").is_some() {
        all.extend([Kind::BadCount, Kind::BadPath, Kind::BadConfig, Kind::MediaType]);
    }
    if is_idempotent(&method.to_uppercase(), path) {
        all.extend([Kind::NoRoom, Kind::KeyReused, Kind::VmGone]);
    } else if method == "post"
        && ["/prepare", "/snapshot", "/working-set", "/keep", "/suspend"].iter().any(|end| path.ends_with(end))
    {
        all.push(Kind::NoRoom);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::server::described;

    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_resolves_and_every_operation_is_complete() {
        let document = described();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let mut ids = BTreeSet::new();
        for (path, item) in paths(&document) {
            for (method, operation) in item.as_object().unwrap() {
                let what = format!("{method} {path}");
                assert!(
                    ids.insert(operation["operationId"].as_str().unwrap().to_owned()),
                    "{what}: the id is another's"
                );
                assert!(operation["summary"].is_string(), "{what}");
                let answers = operation["responses"].as_object().unwrap();
                assert!(answers.contains_key("200") && answers.contains_key("401"), "{what}");
                for (status, answer) in answers {
                    assert!(answer["content"].is_object(), "{what}: {status}");
                    let is_problem = answer["content"].get(PROBLEM_TYPE).is_some();
                    assert_eq!(is_problem, !status.starts_with('2'), "{what}: {status}");
                }
                let names = path.matches('{').count();
                let of_path =
                    operation["parameters"].as_array().into_iter().flatten().filter(|one| one["in"] == "path");
                assert_eq!(of_path.count(), names, "{what}");
            }
        }
    }

    #[test]
    fn what_makes_something_takes_a_key_and_may_find_no_room() {
        let document = described();
        let mut found = 0;
        for (path, item) in paths(&document) {
            for (method, operation) in item.as_object().unwrap() {
                let answer = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].as_str();
                let makes = ["VmInfo", "ForkAnswer", "CheckpointInfo"]
                    .iter()
                    .any(|name| method == "post" && answer.is_some_and(|answer| answer.ends_with(&format!("/{name}"))));
                // These answer with the changed state.
                if !makes
                    || ["/pause", "/resume", "/labels", "/ttl", "/network", "/keep"]
                        .iter()
                        .any(|end| path.ends_with(end))
                {
                    continue;
                }
                found += 1;
                let header = |one: &Value| one["in"] == "header" && one["name"] == "Idempotency-Key";
                assert!(operation["parameters"].as_array().unwrap().iter().any(header), "{path}");
                assert!(operation["responses"].get("507").is_some(), "{path}");
            }
        }
        assert_eq!(found, 6);
    }

    #[test]
    fn each_call_has_the_errors_of_its_body_and_of_the_vms_process() {
        use ProblemKind::{BadName, NoRoom, NoSuchCheckpoint, VmSilent};
        let document = described();
        for (path, kinds) in [
            ("/v1/vms", &[BadName, VmSilent][..]),
            ("/v1/restore", &[BadName]),
            ("/v1/checkpoints", &[BadName]),
            ("/v1/vms/{name}/rollback", &[NoSuchCheckpoint, VmSilent]),
            ("/v1/vms/{name}/suspend", &[NoRoom, VmSilent]),
            ("/v1/vms/{name}/fork", &[VmSilent]),
            ("/v1/vms/{name}/checkpoint", &[VmSilent]),
            ("/v1/vms/{name}/snapshot", &[VmSilent]),
            ("/v1/vms/{name}/network", &[VmSilent]),
            ("/v1/vms/{name}/stop", &[VmSilent]),
            ("/v1/vms/{name}/working-set", &[VmSilent]),
        ] {
            for kind in kinds {
                let answer = &document["paths"][path]["post"]["responses"][kind.status().as_str()];
                let text = answer["description"].as_str().unwrap_or_default();
                assert!(text.contains(&format!("`{}`", kind.slug())), "{path}: {kind:?} is not in {text:?}");
            }
        }
        // No process of a VM is asked.
        assert!(document["paths"]["/v1/vms"]["get"]["responses"].get("504").is_none());
    }

    #[test]
    fn a_login_alone_needs_no_token_in_a_header() {
        let document = described();
        let free = |operation: &Value| operation["security"] == json!([{}]);
        let all = paths(&document);
        let without: Vec<_> = all
            .iter()
            .flat_map(|(path, item)| item.as_object().unwrap().iter().map(move |(method, one)| (method, path, one)))
            .filter(|(.., operation)| free(operation))
            .map(|(method, path, _)| format!("{method} {path}"))
            .collect();
        assert_eq!(without, ["post /v1/session"]);
    }

    #[test]
    fn a_bound_in_the_document_is_that_of_the_code() {
        let document = described();
        let count = &document["components"]["schemas"]["ForkRequest"]["properties"]["count"];
        assert_eq!(
            (count["minimum"].as_u64(), count["maximum"].as_u64()),
            (Some(1), Some(clade_api::MAX_CHILDREN as u64))
        );
        let count = &document["components"]["schemas"]["PrepareRequest"]["properties"]["count"];
        assert_eq!(count["maximum"].as_u64(), Some(clade_api::MAX_CHILDREN as u64));
        let boot = &document["components"]["schemas"]["BootRequest"]["properties"]["name"];
        for field in ["pattern", "minLength", "maxLength"] {
            assert_eq!(boot[field], name_schema()[field], "{field}");
        }
    }
}
