//! The Prometheus text format, version 0.0.4.

use std::fmt::Write;

use clade_api::HistogramInfo;

/// The format's media type.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetricKind {
    /// A count that only grows.
    Counter,
    /// A value that goes up and down.
    Gauge,
    /// Counts of durations.
    Histogram,
}

/// Labels of a sample.
pub(crate) type MetricLabels<'a> = &'a [(&'a str, &'a str)];

/// Metrics as text. All samples of a family follow its head.
#[derive(Debug, Default)]
pub(crate) struct Exposition {
    text: String,
    family: &'static str,
}

fn escaped(text: &str, quotes: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quotes => out.push_str("\\\""),
            c => out.push(c),
        }
    }
    out
}

impl Exposition {
    /// Begins a family of metrics.
    pub(crate) fn family(&mut self, name: &'static str, kind: MetricKind, help: &str) {
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        let help = escaped(help, false);
        // Writing to a String cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        self.family = name;
    }

    fn line(&mut self, suffix: &str, labels: MetricLabels<'_>, bound: Option<&str>, value: f64) {
        self.text.push_str(self.family);
        self.text.push_str(suffix);
        let bound = bound.map(|bound| ("le", bound));
        let mut separator = '{';
        for (key, value) in labels.iter().copied().chain(bound) {
            let _ = write!(self.text, "{separator}{key}=\"{}\"", escaped(value, true));
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// Adds a sample of the family.
    pub(crate) fn sample(&mut self, labels: MetricLabels<'_>, value: f64) {
        self.line("", labels, None, value);
    }

    /// Adds a sample of a count.
    #[expect(clippy::cast_precision_loss, reason = "the format's numbers are floats")]
    pub(crate) fn count(&mut self, labels: MetricLabels<'_>, value: u64) {
        self.sample(labels, value as f64);
    }

    /// Adds the samples of a histogram, in seconds.
    #[expect(clippy::cast_precision_loss, reason = "the format's numbers are floats")]
    pub(crate) fn histogram(&mut self, labels: MetricLabels<'_>, histogram: &HistogramInfo) {
        let mut up_to = 0u64;
        for (bound_us, count) in &histogram.buckets {
            up_to = up_to.saturating_add(*count);
            let bound = (*bound_us as f64 / 1e6).to_string();
            self.line("_bucket", labels, Some(&bound), up_to as f64);
        }
        self.line("_bucket", labels, Some("+Inf"), histogram.count as f64);
        self.line("_sum", labels, None, histogram.sum_us as f64 / 1e6);
        self.line("_count", labels, None, histogram.count as f64);
    }

    /// Returns the text.
    pub(crate) fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_help_are_escaped() {
        let mut out = Exposition::default();
        out.family("clade_test", MetricKind::Gauge, "a\\b\nc \"d\"");
        out.count(&[("vm", "a\\b\"c\nd"), ("clade", "x")], 3);
        out.sample(&[], 0.5);
        assert_eq!(
            out.finish(),
            "# HELP clade_test a\\\\b\\nc \"d\"\n# TYPE clade_test gauge\n\
             clade_test{vm=\"a\\\\b\\\"c\\nd\",clade=\"x\"} 3\nclade_test 0.5\n"
        );
    }

    #[test]
    fn buckets_of_a_histogram_add_up() {
        let mut out = Exposition::default();
        out.family("clade_pause_seconds", MetricKind::Histogram, "Pauses.");
        let histogram = HistogramInfo { count: 6, sum_us: 2_500_000, buckets: vec![(16, 2), (32, 0), (64, 3)] };
        out.histogram(&[("vm", "web")], &histogram);
        let text = out.finish();
        let samples: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            samples,
            [
                "clade_pause_seconds_bucket{vm=\"web\",le=\"0.000016\"} 2",
                "clade_pause_seconds_bucket{vm=\"web\",le=\"0.000032\"} 2",
                "clade_pause_seconds_bucket{vm=\"web\",le=\"0.000064\"} 5",
                "clade_pause_seconds_bucket{vm=\"web\",le=\"+Inf\"} 6",
                "clade_pause_seconds_sum{vm=\"web\"} 2.5",
                "clade_pause_seconds_count{vm=\"web\"} 6",
            ]
        );
    }
}
