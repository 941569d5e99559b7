//! The kind of each page of a VM: `GET /v1/vms/{name}/pages`.
//!
//! | query | answer |
//! |---|---|
//! | `from=GFN`, `max_runs=N` | runs of pages of one kind, from a guest frame on; the first frame of the next request |
//! | `cells=N` | the numbers of pages by kind in each of N equal parts |

use std::collections::BTreeMap;

use axum::extract::{Path as UrlPath, RawQuery};
use axum::{Extension, Json};
use tokio::sync::Semaphore;

use super::query::{self, QueryError, within};
use super::stats::layers;
use super::with_vm_host;
use crate::vm_host::WeakVmHost;
use clade_api::http::Answer;
use clade_api::{CellInfo, MAX_CELLS, PagesAnswer, RunInfo};
use clade_memory::{PageKind, PageMap};

/// Most runs of an answer.
const MAX_RUNS: u64 = 65_536;
/// Page maps made at a time: each reads all of the VM's pages.
pub(super) static MAPS: Semaphore = Semaphore::const_new(4);
/// The last guest frame number: 8 TiB of memory.
pub(super) const MAX_FROM: u64 = i32::MAX as u64;
/// Runs of an answer whose request names no number.
const DEFAULT_RUNS: u64 = 4_096;

/// The requested form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Query {
    Runs { from: u64, most: usize },
    Cells(u64),
}

impl Query {
    fn parse(text: &str) -> Result<Self, QueryError> {
        let [from, most, cells] = query::parse_numbers(text, ["from", "max_runs", "cells"])?;
        match cells {
            Some(_) if from.is_some() || most.is_some() => {
                let reason = "counts all pages: it goes with neither from nor max_runs";
                Err(QueryError::NotHere { key: "cells", reason })
            }
            Some(cells) => Ok(Self::Cells(within("cells", cells, 1..=MAX_CELLS)?)),
            None => {
                let from = within("from", from.unwrap_or(0), 0..=MAX_FROM)?;
                let most = within("max_runs", most.unwrap_or(DEFAULT_RUNS), 1..=MAX_RUNS)?;
                Ok(Self::Runs { from, most: most as usize })
            }
        }
    }
}

/// Returns at most `most` runs from the guest frame `from` on, and the start of the rest.
fn runs(map: &PageMap, from: u64, most: usize) -> (Vec<RunInfo>, Option<u64>) {
    let first = map.runs.partition_point(|run| run.first + run.count <= from);
    let rest = &map.runs[first..];
    let mut runs: Vec<RunInfo> = rest.iter().take(most).map(RunInfo::from).collect();
    if let Some(run) = runs.first_mut().filter(|run| run.first < from) {
        run.count -= from - run.first;
        run.first = from;
    }
    (runs, rest.get(most).map(|run| run.first))
}

/// Returns `count` equal parts of all pages; one a page if there are fewer pages.
fn cells(map: &PageMap, count: u64) -> Vec<CellInfo> {
    let total: u64 = map.runs.iter().map(|run| run.count).sum();
    let count = count.min(total);
    // The first page of each, counted over all regions.
    let bound = |cell: u64| (u128::from(cell) * u128::from(total) / u128::from(count.max(1))) as u64;
    let mut cells = Vec::with_capacity(count as usize);
    let (mut at, mut run, mut within) = (0, 0, 0);
    for cell in 0..count {
        let mut info = CellInfo { first: map.runs[run].first + within, ..CellInfo::default() };
        let mut of_layer: BTreeMap<u64, u64> = BTreeMap::new();
        while at < bound(cell + 1) {
            let now = &map.runs[run];
            let pages = (now.count - within).min(bound(cell + 1) - at);
            match now.kind {
                PageKind::Absent => info.pages.absent += pages,
                PageKind::Reference => info.pages.reference += pages,
                PageKind::Exclusive => info.pages.exclusive += pages,
                PageKind::Pinned => info.pages.pinned += pages,
                PageKind::Shared(layer) => {
                    info.pages.shared += pages;
                    *of_layer.entry(layer.number()).or_default() += pages;
                }
            }
            at += pages;
            within += pages;
            if within == now.count {
                (run, within) = (run + 1, 0);
            }
        }
        info.layer = of_layer.into_iter().max_by_key(|(_, pages)| *pages).map(|(layer, _)| layer);
        cells.push(info);
    }
    cells
}

/// Shows the kind of each page of a VM's memory: as runs, or counted in parts.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/pages",
    params(
        ("from" = Option<u64>, Query, description = "The first guest frame number of the runs.", minimum = 0, maximum = 2147483647),
        ("max_runs" = Option<u64>, Query, description = "Most runs.", minimum = 1, maximum = 65536),
        ("cells" = Option<u64>, Query, description = "Equal parts to count pages in, instead of runs.", minimum = 1, maximum = 65536),
    ),
    responses((status = 200, description = "Done.", body = PagesAnswer))
)]
pub(super) async fn show_pages(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
) -> Answer<PagesAnswer> {
    let query = Query::parse(query.as_deref().unwrap_or_default())?;
    // The semaphore is never closed.
    let _turn = MAPS.acquire().await;
    let answer = with_vm_host(vm_host, move |vm_host| {
        let map = vm_host.get(&name)?.vm.page_map()?;
        let mut answer = PagesAnswer {
            totals: map.totals().into(),
            layers: layers(&map),
            runs: Vec::new(),
            next: None,
            cells: Vec::new(),
        };
        match query {
            Query::Runs { from, most } => (answer.runs, answer.next) = runs(&map, from, most),
            Query::Cells(count) => answer.cells = cells(&map, count),
        }
        Ok(answer)
    });
    Ok(Json(answer.await?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use clade_api::{KindCounts, ProblemKind, RunKind};
    use clade_memory::PageRun;

    use super::*;

    fn map() -> PageMap {
        let run = |first, count, kind| PageRun { first, count, kind };
        let runs = vec![
            run(0, 10, PageKind::Exclusive),
            run(10, 5, PageKind::Reference),
            run(15, 1, PageKind::Pinned),
            run(100, 20, PageKind::Absent),
            run(120, 4, PageKind::Exclusive),
        ];
        PageMap { runs, layers: Vec::new() }
    }

    #[test]
    fn a_query_is_numbers_within_bounds() {
        assert_eq!(Query::parse(""), Ok(Query::Runs { from: 0, most: DEFAULT_RUNS as usize }));
        assert_eq!(Query::parse("from=7&max_runs=3"), Ok(Query::Runs { from: 7, most: 3 }));
        assert_eq!(Query::parse("cells=64"), Ok(Query::Cells(64)));
        for (text, named) in [
            ("cells=0", "cells=0"),
            ("cells=65537", "65537"),
            ("max_runs=0", "max_runs=0"),
            ("max_runs=65537", "65537"),
            ("cells=x", "\"x\""),
            ("from=-1", "\"-1\""),
            ("from", "from=\"\""),
            ("cell=3", "\"cell\""),
            ("cells=3&from=1", "neither"),
        ] {
            let error = Query::parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn a_page_map_is_made_when_few_enough_others_are() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ask = |query: &str| {
            let asked =
                show_pages(Extension(WeakVmHost::gone()), UrlPath("web".to_owned()), RawQuery(Some(query.to_owned())));
            async { asked.await.map(drop).map_err(|error| error.kind) }
        };
        runtime.block_on(async {
            let others = MAPS.acquire_many(4).await.unwrap();
            let mut asked = std::pin::pin!(ask("cells=8"));
            assert!(timeout(Duration::from_millis(100), asked.as_mut()).await.is_err(), "it waits");
            assert_eq!(ask("cells=0").await, Err(ProblemKind::BadRequest), "nothing is to be made");
            drop(others);
            assert_eq!(asked.await, Err(ProblemKind::Ending));
        });
    }

    #[test]
    fn pages_of_runs_are_all_there_however_they_are_asked_for() {
        let map = map();
        let whole = runs(&map, 0, MAX_RUNS as usize).0;
        for most in 1..=6 {
            let (mut from, mut all) = (Some(0), Vec::new());
            while let Some(at) = from {
                let (some, next) = runs(&map, at, most);
                assert!(some.len() <= most);
                all.extend(some);
                from = next;
            }
            assert_eq!(all, whole, "{most}");
        }
        assert_eq!(runs(&map, 12, 1).0[0], RunInfo { first: 12, count: 3, kind: RunKind::Reference, layer: None });
        assert_eq!(runs(&map, 50, 1).0[0].first, 100, "in a gap");
        assert_eq!(runs(&map, 124, 1), (Vec::new(), None));
    }

    #[test]
    fn cells_are_equal_and_hold_every_page_once() {
        let map = map();
        for count in [1, 2, 3, 7, 39, 40, 41, 1000] {
            let cells = cells(&map, count);
            assert_eq!(cells.len() as u64, count.min(40));
            let sizes: Vec<u64> = cells.iter().map(|cell| cell.pages.total()).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
            let sum = |of: fn(&KindCounts) -> u64| cells.iter().map(|cell| of(&cell.pages)).sum::<u64>();
            let totals = [sum(|p| p.absent), sum(|p| p.reference), sum(|p| p.shared), sum(|p| p.exclusive)];
            assert_eq!((totals, sum(|p| p.pinned)), ([20, 5, 0, 14], 1));
        }
        let two = cells(&map, 2);
        assert_eq!((two[0].first, two[1].first), (0, 104));
        assert_eq!(cells(&PageMap::default(), 8), []);
    }
}
