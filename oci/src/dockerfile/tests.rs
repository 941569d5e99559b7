use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::manifest::RunConfig;

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn base() -> RunConfig {
    RunConfig {
        entrypoint: texts(&["/entry"]),
        cmd: texts(&["serve"]),
        env: texts(&["PATH=/bin", "A=1"]),
        working_dir: "/srv".to_owned(),
        user: String::new(),
        ..RunConfig::default()
    }
}

fn plan(text: &str) -> BuildPlan {
    Dockerfile::parse(text).unwrap().plan(&base(), &BTreeMap::new()).unwrap()
}

/// The programs of the `RUN` steps.
fn programs(text: &str) -> Vec<Vec<String>> {
    let of = |step: BuildStep| if let Action::Run(words) = step.action { Some(words) } else { None };
    plan(text).steps.into_iter().filter_map(of).collect()
}

#[test]
fn lines_are_continued_and_comments_left_out() {
    let text = "# syntax=docker/dockerfile:1\n# a comment\r\nfrom base\nRUN one \\\n  # between\n\n  two \\  \n three\n\
                # CMD no\nrun   four\\";
    let of = |text: &str| texts(&["/bin/sh", "-c", text]);
    assert_eq!(programs(text), [of("one   two  three"), of("four")]);
    let error = Dockerfile::parse("FROM a\nRUN x \\\n y\n\nADD http://x /\n").unwrap_err();
    assert_eq!((error.line, error.instruction.as_str()), (5, "ADD"));
    // The error of an instruction over several lines has the number of the first.
    assert_eq!(Dockerfile::parse("FROM a\nADD \\\n b \\\n c").unwrap_err().line, 2);
}

#[test]
fn an_escaped_backslash_continues_no_line() {
    let text = "FROM base\nRUN printf x >> /f \\\\\nUSER app\nRUN a \\ \nb";
    let of = |text: &str| texts(&["/bin/sh", "-c", text]);
    assert_eq!(programs(text), [of(r"printf x >> /f \\"), of("a b")]);
    assert_eq!(plan(text).config.user, "app");
}

#[test]
fn the_base_images_shell_runs_texts_and_its_triggers_are_refused() {
    let file = Dockerfile::parse("FROM base\nRUN a | b\nRUN [\"c\"]\nENTRYPOINT e\nCMD d").unwrap();
    let bash = texts(&["/bin/bash", "-o", "pipefail", "-c"]);
    let by_bash = |text: &str| [&bash[..], &texts(&[text])].concat();
    let plan = file.plan(&RunConfig { shell: bash.clone(), ..base() }, &BTreeMap::new()).unwrap();
    let actions: Vec<_> = plan.steps.iter().map(|step| &step.action).collect();
    assert_eq!(actions, [&Action::Run(by_bash("a | b")), &Action::Run(texts(&["c"]))]);
    assert_eq!((plan.config.cmd, plan.config.entrypoint), (by_bash("d"), by_bash("e")));
    let base = RunConfig { on_build: texts(&["COPY . /app"]), ..base() };
    let refused = file.plan(&base, &BTreeMap::new()).unwrap_err();
    assert!(refused.line == 1 && refused.to_string().contains("COPY . /app"), "{refused}");
}

#[test]
fn a_program_is_a_list_or_a_text_for_a_shell() {
    let sh = |text: &str| texts(&["/bin/sh", "-c", text]);
    for (text, words) in [
        (r#"["a", "b c", "$A"]"#, texts(&["a", "b c", "$A"])),
        (r#"[ "a\"b" ]"#, texts(&["a\"b"])),
        ("echo \"a  b\" 'c' $A", sh("echo \"a  b\" 'c' $A")),
        // Not JSON: a shell can interpret it.
        ("['a', 'b']", sh("['a', 'b']")),
        ("[ -f x ] && y", sh("[ -f x ] && y")),
        ("cat <<< x", sh("cat <<< x")),
        ("echo $((1<<2))", sh("echo $((1<<2))")),
    ] {
        assert_eq!(programs(&format!("FROM a\nRUN {text}")), [words], "{text}");
    }
}

#[test]
fn variables_are_replaced_in_words_and_not_in_programs() {
    let text = r#"FROM a
ARG V=2 W
ARG U=${W:-none}
ENV B="x y" C='$A' D=$A-${A}x E=\$A F="${NO:-d $A}" G=${A:+set} H=a\ b
ENV OLD some  words $A
ENV A=9 Z=$A
WORKDIR /w
WORKDIR $A/${V}
USER app
RUN run"#;
    let plan = plan(text);
    let step = plan.steps.last().unwrap();
    let wanted = pairs(&[
        ("A", "9"),
        ("B", "x y"),
        ("C", "$A"),
        ("D", "1-1x"),
        ("E", "$A"),
        ("F", "d 1"),
        ("G", "set"),
        ("H", "a b"),
        ("OLD", "some  words 1"),
        ("PATH", "/bin"),
        ("U", "none"),
        ("V", "2"),
        // An instruction does not see its own variables.
        ("Z", "1"),
    ]);
    assert_eq!(*step.env, wanted);
    assert_eq!((step.workdir.as_str(), step.user.as_str(), step.line), ("/w/9/2", "app", 10));
    let dirs: Vec<&Action> = plan.steps.iter().map(|step| &step.action).take(2).collect();
    assert_eq!(dirs, [&Action::MakeDir("/w".to_owned()), &Action::MakeDir("/w/9/2".to_owned())]);
    // An ARG applies to the build alone.
    assert!(plan.config.env.contains(&"A=9".to_owned()) && !plan.config.env.iter().any(|one| one.starts_with("V=")));
    assert_eq!((plan.config.user.as_str(), plan.config.working_dir.as_str()), ("app", "/w/9/2"));
}

#[test]
fn the_platform_and_proxies_are_arguments_of_every_build() {
    let file = Dockerfile::parse(
        "FROM --platform=$BUILDPLATFORM a/${TARGETARCH}\nRUN a\nARG TARGETARCH\nARG TARGETOS=mine\nRUN b",
    )
    .unwrap();
    assert_eq!(file.base(&pairs(&[])).unwrap(), "a/amd64");
    assert_eq!(file.base(&pairs(&[("TARGETARCH", "x")])).unwrap(), "a/x");
    let given = pairs(&[("http_proxy", "http://p:1"), ("NO_PROXY", "b")]);
    let steps = file.plan(&base(), &given).unwrap().steps;
    let of = |step: usize, name: &str| steps[step].env.get(name).cloned().unwrap_or_default();
    assert_eq!(
        (of(0, "TARGETARCH"), of(1, "TARGETARCH"), of(1, "TARGETOS")),
        ("".into(), "amd64".into(), "mine".into())
    );
    for proxy in ["http_proxy", "HTTP_PROXY"] {
        assert_eq!(of(0, proxy), "http://p:1");
    }
    assert_eq!((of(1, "NO_PROXY"), of(1, "no_proxy")), ("b".into(), "b".into()));
    // Not in words: they could come into the image.
    let other = Dockerfile::parse("FROM a\nENV U=x$http_proxy http_proxy=own\nRUN a").unwrap();
    let own = other.plan(&base(), &given).unwrap();
    assert_eq!((own.steps[0].env["U"].as_str(), own.steps[0].env["http_proxy"].as_str()), ("x", "http://p:1"));
    assert!(own.config.env.contains(&"http_proxy=own".to_owned()), "{:?}", own.config.env);
    let config = file.plan(&base(), &given).unwrap().config;
    assert!(!config.env.iter().any(|one| one.contains("PROXY") || one.contains("http")), "{:?}", config.env);
}

#[test]
fn variables_and_steps_have_bounds() {
    let refused = |text: &str| {
        let error = Dockerfile::parse(text).unwrap().plan(&base(), &pairs(&[])).unwrap_err();
        assert!(error.why.contains("at most"), "{error}");
        error.line
    };
    let long = "x".repeat(60 << 10);
    let grow = |word: &str| (0..5).map(|number| format!("{word} A{number}={long}\n")).collect::<String>();
    assert_eq!(refused(&format!("FROM a\n{}", grow("ENV"))), 6);
    assert_eq!(refused(&format!("FROM a\n{}", grow("ARG"))), 6);
    assert_eq!(refused(&format!("FROM a\n{}", "RUN a\n".repeat(1001))), 1002);
    // In one instruction, of one variable, before FROM, and in paths.
    let many = "a=$X ".repeat(5);
    assert_eq!(refused(&format!("FROM a\nENV X={long}\nENV {many}")), 3);
    assert_eq!(refused(&format!("FROM a\nENV X={long}\nCOPY {} /d/", "$X ".repeat(5))), 3);
    assert_eq!(refused(&format!("FROM a\n{}", format!("WORKDIR {}\n", "w".repeat(1000)).repeat(5))), 6);
    let before: String = (0..5).map(|number| format!("ARG A{number}={long}\n")).collect();
    let error = Dockerfile::parse(&format!("{before}FROM a")).unwrap().base(&pairs(&[])).unwrap_err();
    assert!(error.line == 5 && error.why.contains("at most"), "{error}");
    // Steps without a change between them share their variables.
    let steps = plan("FROM a\nENV A=1\nRUN a\nRUN b\nARG B=2\nRUN c").steps;
    assert!(Arc::ptr_eq(&steps[0].env, &steps[1].env));
    assert_eq!((steps[1].env.get("B"), steps[2].env["B"].as_str()), (None, "2"));
}

#[test]
fn arguments_are_given_and_those_before_from_are_for_it() {
    let file = Dockerfile::parse("ARG TAG=1\nARG NAME=img-$TAG\nFROM reg/$NAME:${TAG} AS x\nARG TAG\nARG O=5\nRUN x");
    let file = file.unwrap();
    assert_eq!(file.base(&pairs(&[])).unwrap(), "reg/img-1:1");
    assert_eq!(file.base(&pairs(&[("TAG", "7")])).unwrap(), "reg/img-7:7");
    let env = |given: &[(&str, &str)]| file.plan(&base(), &pairs(given)).unwrap().steps[0].env.clone();
    assert_eq!((env(&[])["TAG"].as_str(), env(&[])["O"].as_str()), ("1", "5"));
    assert_eq!(env(&[("TAG", "7"), ("O", "6")])["O"], "6");
    assert!(!env(&[]).contains_key("NAME"), "one before FROM is not of the build unless it is named again");
    let error = file.plan(&base(), &pairs(&[("NOPE", "1")])).unwrap_err();
    assert!(error.to_string().contains("NOPE"), "{error}");
}

#[test]
fn the_start_command_is_docker_s() {
    let started = |text: &str| {
        let config = plan(&format!("FROM a\n{text}")).config;
        [config.entrypoint, config.cmd].concat().join(" ")
    };
    for (text, words) in [
        ("", "/entry serve"),
        ("CMD [\"x\"]", "/entry x"),
        ("CMD x y", "/entry /bin/sh -c x y"),
        ("ENTRYPOINT [\"e\"]", "e"),
        ("CMD [\"x\"]\nENTRYPOINT [\"e\"]", "e x"),
        ("ENTRYPOINT [\"e\"]\nCMD [\"x\"]", "e x"),
        ("CMD [\"x\"]\nENTRYPOINT e f", "/bin/sh -c e f"),
        ("ENTRYPOINT []\nCMD x", "/bin/sh -c x"),
        ("CMD a\nCMD b", "/entry /bin/sh -c b"),
        ("EXPOSE 80/tcp\nLABEL a=b", "/entry serve"),
    ] {
        assert_eq!(started(text), words, "{text}");
    }
}

#[test]
fn files_go_where_the_directory_is() {
    let files = |text: &str| match plan(&format!("FROM a\n{text}")).steps.pop().unwrap().action {
        Action::Copy(files) => files,
        other => panic!("{other:?}"),
    };
    for (text, to) in [
        ("COPY a b", "/srv/b"),
        ("COPY a .", "/srv/"),
        ("COPY a ./", "/srv/"),
        ("COPY a ./sub/", "/srv/sub/"),
        ("COPY a /x/.", "/x/"),
        ("COPY a b /x/", "/x/"),
        ("WORKDIR /\nCOPY a .", "/"),
    ] {
        assert_eq!(files(text).to, to, "{text}");
    }
    let all = files(r#"COPY --chown=app:staff --chmod=640 --link ["a b", "$A", "/x/"]"#);
    assert_eq!((all.sources, all.owner.as_deref(), all.mode), (texts(&["a b", "1"]), Some("app:staff"), Some(0o640)));
}

#[test]
fn labels_ports_and_texts_are_those_of_the_result() {
    let plan =
        plan("FROM a\nARG V=1\nLABEL a=b org.example.version=\"$V x\"\nLABEL a c d\nEXPOSE $V 53/UDP 8000-8002\nRUN x");
    let labels = [("a", "c d"), ("org.example.version", "1 x")];
    assert_eq!(plan.labels, labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    let ports = ["1/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp"];
    assert_eq!(plan.ports, ports.map(str::to_owned).into());
    assert_eq!((plan.instructions.len(), plan.instructions[4].as_str()), (5, "RUN x"));
    let large = format!("ARG BIG={}\n{}", "x".repeat(60_000), "LABEL a=$BIG b=$BIG\n".repeat(2));
    assert_eq!(self::plan(&format!("FROM a\n{large}")).labels.len(), 2);
    let labels: String = (0..20).map(|at| format!("LABEL n{at}=$BIG\n")).collect();
    let refused = |text: &str| {
        let file = Dockerfile::parse(&format!("FROM a\n{text}")).unwrap();
        file.plan(&base(), &BTreeMap::new()).unwrap_err().why
    };
    assert!(refused(&format!("{large}{labels}")).contains("labels"));
    assert!(refused("EXPOSE 1-1024\nEXPOSE 2000").contains("in all"));
    for (text, why) in
        [("EXPOSE 0", "\"0\""), ("EXPOSE 1-9999", "1024"), ("EXPOSE 9-8", "9-8"), ("EXPOSE 80/x", "80/x")]
    {
        let error = Dockerfile::parse(&format!("FROM a\n{text}")).unwrap().plan(&base(), &BTreeMap::new()).unwrap_err();
        assert!(error.line == 2 && error.why.contains(why), "{text}: {error}");
    }
    assert!(Dockerfile::parse("FROM a\nLABEL").is_err() && Dockerfile::parse("FROM a\nEXPOSE").is_err());
}

#[test]
fn what_is_not_known_is_refused_with_its_line() {
    for (text, line, instruction, why) in [
        ("", 1, "FROM", "missing"),
        ("RUN x", 1, "RUN", "FROM comes first"),
        ("FROM a\nFROM b", 2, "FROM", "stages"),
        ("FROM a\n\nCOPY --from=a b c", 3, "COPY", "stages"),
        ("FROM scratch", 1, "FROM", "scratch"),
        ("FROM --platform=linux/arm64 a", 1, "FROM", "arm64"),
        ("FROM a b", 1, "FROM", "a b"),
        ("FROM a\nADD http://x /x", 2, "ADD", "not supported"),
        ("FROM a\nHEALTHCHECK NONE", 2, "HEALTHCHECK", "ready command"),
        ("FROM a\nVOLUME /x", 2, "VOLUME", "not supported"),
        ("FROM a\nFROB x", 2, "FROB", "no such"),
        ("FROM a\nRUN --mount=type=cache x", 2, "RUN", "--mount"),
        ("FROM a\nRUN cat <<EOF\nx\nEOF", 2, "RUN", "here-documents"),
        ("FROM a\nRUN", 2, "RUN", "no program"),
        ("FROM a\nRUN []", 2, "RUN", "no program"),
        ("FROM a\nCOPY a", 2, "COPY", "where to"),
        ("FROM a\nENV A", 2, "ENV", "no value"),
        ("FROM a\nENV 1=2", 2, "ENV", "no name"),
        ("FROM a\nARG a-b=1", 2, "ARG", "no name"),
        ("# escape=`\nFROM a", 1, "# escape", "continues"),
    ] {
        let error = Dockerfile::parse(text).unwrap_err();
        assert_eq!((error.line, error.instruction.as_str()), (line, instruction), "{text}: {error}");
        assert!(error.why.contains(why), "{text}: {error}");
    }
    for (text, why) in [
        ("ENV A=\"x", "open quote"),
        ("ENV A=${A", "brace"),
        ("ENV A=${A#x}", "${A#x}"),
        ("ENV A=${}", "no variable"),
        ("USER app:staff", "app:staff"),
        ("USER $NO", "\"\""),
        ("COPY a b /x", "several sources"),
        ("COPY --chmod=u+x a /x", "u+x"),
        ("COPY --chmod=4755 a /x", "4755"),
        ("COPY --chown=-R a /x", "-R"),
    ] {
        let error = Dockerfile::parse(&format!("FROM a\n{text}")).unwrap().plan(&base(), &BTreeMap::new()).unwrap_err();
        assert!(error.line == 2 && error.why.contains(why), "{text}: {error}");
    }
}

#[test]
fn words_do_not_grow_without_end() {
    let doubled = "ENV A=$A$A$A$A\n".repeat(40);
    let error = Dockerfile::parse(&format!("FROM a\n{doubled}")).unwrap().plan(&base(), &BTreeMap::new()).unwrap_err();
    assert!(error.why.contains("at most"), "{error}");
    let deep = format!("FROM a\nENV A={}x{}", "${N:-".repeat(100), "}".repeat(100));
    let error = Dockerfile::parse(&deep).unwrap().plan(&base(), &BTreeMap::new()).unwrap_err();
    assert!(error.why.contains("levels"), "{error}");
}

#[test]
fn patterns_match_paths() {
    for (pattern, path, is_matched) in [
        ("a", "a", true),
        ("/a/", "a", true),
        ("a", "a/b", false),
        ("*", "a/b", false),
        ("*/b", "a/b", true),
        ("**", "a/b", true),
        ("**/c", "c", true),
        ("**/c", "a/b/c", true),
        ("a/**", "a/b/c", true),
        ("a/**/z", "a/z", true),
        ("*.py", "x.py", true),
        ("*.py", "x.pyc", false),
        ("a*b*c", "aXbYbc", true),
        ("?.txt", "a.txt", true),
        ("?.txt", ".txt", false),
        ("a/../b", "b", true),
        ("[Bb]in", "bin", true),
        ("[Bb]in", "Bin", true),
        ("[Bb]in", "xin", false),
        ("[^a-c]x", "dx", true),
        ("[^a-c]x", "bx", false),
        ("[^^]", "^", false),
        ("[a^]", "^", true),
        ("*.[ch]", "a.c", true),
        ("*.[ch]", "a.cc", false),
        ("[0-9a-f][0-9a-f]", "9e", true),
        ("[a\\-z]", "-", true),
        ("[a\\-z]", "b", false),
        ("[\\]]", "]", true),
        ("a]", "a]", true),
        ("\\*", "*", true),
        ("\\*", "a", false),
        ("\\[a]", "[a]", true),
        ("?", "é", true),
        ("[à-é]", "é", true),
    ] {
        assert_eq!(Pattern::parse(pattern).unwrap().matches(path), is_matched, "{pattern} {path}");
    }
    for wrong in ["..", "../a", "a/../../b", "/..", "[ab", "[]", "[]a]", "[-a]", "[a-]", "[a-z", "[^]", "[", "b["] {
        let error = Pattern::parse(wrong).unwrap_err();
        assert!(error.to_string().contains(wrong), "{error}");
    }
    assert_eq!(Pattern::parse("./a//b/").unwrap().path().as_deref(), Some("a/b"));
    for not_one in ["a*", "a?", "[a]", "**"] {
        assert_eq!(Pattern::parse(not_one).unwrap().path(), None);
    }
    assert_eq!(Pattern::parse("a\\*/\\[b]").unwrap().path().as_deref(), Some("a*/[b]"));
    assert!(Pattern::parse("a\\").unwrap_err().to_string().contains("backslash"));
}

#[test]
fn the_last_pattern_of_an_ignore_file_decides() {
    let ignore = Ignore::parse("# all logs\n*.log\n\n.git\nbuild\n!build/keep\n**/secret\n!keep.log\n").unwrap();
    for (path, is_left_out) in [
        ("a.log", true),
        ("sub/a.log", false),
        ("keep.log", false),
        (".git", true),
        (".git/config", true),
        ("build/x/y", true),
        ("build/keep", false),
        ("build/keep/z", false),
        ("a/b/secret", true),
        ("a/b/secret/c", true),
        ("src", false),
    ] {
        assert_eq!(ignore.leaves_out(path), is_left_out, "{path}");
    }
    assert!(ignore.has_exceptions() && !Ignore::parse("a\n").unwrap().has_exceptions());
    assert!(!Ignore::default().leaves_out("a"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in dockerfile()) {
        if let Ok(file) = Dockerfile::parse(&text) {
            let given = pairs(&[("A", "$B${")]);
            let _ = file.base(&given);
            let _ = file.plan(&base(), &given);
            let _ = file.plan(&base(), &BTreeMap::new());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let text = String::from_utf8_lossy(&bytes);
        let _ = Dockerfile::parse(&text);
        let _ = Dockerfile::parse(&format!("FROM a\n{text}")).map(|file| file.plan(&base(), &BTreeMap::new()));
        let _ = Ignore::parse(&text).map(|ignore| ignore.leaves_out(&text));
    }

    /// A pattern of plain names matches its path and everything below.
    #[test]
    fn a_plain_pattern_is_a_path(names in proptest::collection::vec("[a-c]{1,2}", 1..4), path in "[a-c]{1,2}(/[a-c]{1,2}){0,3}") {
        let plain = names.join("/");
        let pattern = Pattern::parse(&plain).unwrap();
        prop_assert_eq!(pattern.matches(&path), plain == path);
        let is_below = path == plain || path.starts_with(&format!("{plain}/"));
        prop_assert_eq!(Ignore::parse(&plain).unwrap().leaves_out(&path), is_below);
    }

    /// A word in double quotes is expanded as by `sh`.
    #[test]
    fn a_quoted_text_is_itself(text in "[ a-z'#/=.]{0,20}") {
        let plan = plan(&format!("FROM a\nENV X=\"{text}\" Y=1\nRUN x"));
        prop_assert_eq!(&plan.steps[0].env["X"], &text);
    }
}

/// Texts that resemble Dockerfiles.
fn dockerfile() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        Just("FROM"),
        Just("RUN"),
        Just("ENV"),
        Just("ARG"),
        Just("COPY"),
        Just("WORKDIR"),
        Just("USER"),
        Just("CMD"),
        Just("ENTRYPOINT"),
        Just("EXPOSE"),
        Just("LABEL"),
        Just("ADD"),
        Just("#"),
        Just(""),
    ];
    let piece = prop_oneof![
        Just("a"),
        Just("A=1"),
        Just("$A"),
        Just("${A"),
        Just("}"),
        Just(":-"),
        Just(":+"),
        Just("\""),
        Just("'"),
        Just("\\"),
        Just("\\\n"),
        Just("["),
        Just("\"x\""),
        Just(","),
        Just("]"),
        Just("--from="),
        Just("--"),
        Just("="),
        Just(" "),
        Just("\n"),
        Just("<<EOF"),
        Just("é"),
        Just("\u{feff}"),
        Just("/"),
        Just(".."),
        Just("."),
    ];
    let line =
        (name, proptest::collection::vec(piece, 0..8)).prop_map(|(name, rest)| format!("{name} {}\n", rest.concat()));
    proptest::collection::vec(line, 0..8).prop_map(|lines| format!("FROM a\n{}", lines.concat()))
}
