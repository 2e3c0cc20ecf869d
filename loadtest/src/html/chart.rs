//! Two kinds of chart as inline SVG: lines over a number, and bars by name.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 15.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 40.0;
const COLOURS: [&str; 4] = ["#2459b3", "#b3581c", "#7a2ea0", "#1a6d35"];
const TICKS: u32 = 4;

pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Something that happened, and how long it was felt.
pub(super) struct Mark {
    pub(super) at: f64,
    pub(super) until: f64,
    pub(super) what: String,
}

pub(super) struct Lines {
    pub(super) x: &'static str,
    pub(super) y: &'static str,
    pub(super) series: Vec<Series>,
    pub(super) marks: Vec<Mark>,
    /// A logarithmic vertical axis.
    pub(super) log: bool,
}

pub(super) struct Bars {
    pub(super) y: &'static str,
    pub(super) groups: Vec<(String, Vec<(String, f64)>)>,
}

/// From values to the drawing's height.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64> + Clone, log: bool) -> Self {
        let high = values.clone().fold(0.0, f64::max);
        let high = if high > 0.0 { high } else { 1.0 };
        let least = values.filter(|value| *value > 0.0).fold(high, f64::min);
        Self { low: if log { least.min(high / 10.0) } else { 0.0 }, high, log }
    }

    fn share(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        share.clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.share(value) * (HEIGHT - TOP - BOTTOM)
    }

    fn tick(&self, number: u32) -> f64 {
        let share = f64::from(number) / f64::from(TICKS);
        if self.log { self.low * (self.high / self.low).powf(share) } else { self.high * share }
    }
}

fn open(out: &mut String) {
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">"
    );
}

fn vertical_axis(out: &mut String, axis: &Axis, name: &str) {
    for number in 0..=TICKS {
        let value = axis.tick(number);
        let y = axis.y(value);
        let right = WIDTH - RIGHT;
        let _ = write!(out, "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#e3e3e8\"/>");
        let (x, y) = (LEFT - 6.0, y + 4.0);
        let _ = write!(out, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", short(value));
    }
    let _ = write!(out, "<text x=\"4\" y=\"12\">{}</text>", super::escape(name));
}

impl Lines {
    pub(super) fn svg(&self) -> String {
        let mut out = String::new();
        let all = || self.series.iter().flat_map(|series| series.points.iter().copied());
        let axis = Axis::of(all().map(|(_, y)| y), self.log);
        let (first, last) = all().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), (x, _)| (a.min(x), b.max(x)));
        let across = (last - first).max(1e-9);
        let x = |value: f64| LEFT + ((value - first) / across).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT);
        open(&mut out);
        for mark in &self.marks {
            let (from, to) = (x(mark.at), x(mark.until));
            let (width, height) = ((to - from).max(1.5), HEIGHT - TOP - BOTTOM);
            let _ = write!(
                out,
                "<rect x=\"{from:.1}\" y=\"{TOP}\" width=\"{width:.1}\" height=\"{height}\" fill=\"#f4c7c3\"><title>{}</title></rect>",
                super::escape(&mark.what)
            );
        }
        vertical_axis(&mut out, &axis, self.y);
        for (number, series) in self.series.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let points: Vec<String> =
                series.points.iter().map(|&(at, value)| format!("{:.1},{:.1}", x(at), axis.y(value))).collect();
            let _ = write!(
                out,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
                points.join(" ")
            );
            let at = LEFT + 90.0 + 150.0 * number as f64;
            let _ =
                write!(out, "<text x=\"{at}\" y=\"12\" style=\"fill:{colour}\">{}</text>", super::escape(&series.name));
        }
        for number in 0..=TICKS {
            let value = first + across * f64::from(number) / f64::from(TICKS);
            let (at, y) = (x(value), HEIGHT - BOTTOM + 16.0);
            let _ = write!(out, "<text x=\"{at:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", short(value));
        }
        let (at, y) = (WIDTH - RIGHT, HEIGHT - 6.0);
        let _ = write!(out, "<text x=\"{at}\" y=\"{y}\" text-anchor=\"end\">{}</text></svg>", super::escape(self.x));
        out
    }
}

impl Bars {
    pub(super) fn svg(&self) -> String {
        let mut out = String::new();
        let values = || self.groups.iter().flat_map(|(_, bars)| bars.iter().map(|(_, value)| *value));
        let axis = Axis::of(values(), false);
        let places = values().count() + self.groups.len();
        let each = ((WIDTH - LEFT - RIGHT) / places.max(1) as f64).min(90.0);
        open(&mut out);
        vertical_axis(&mut out, &axis, self.y);
        let mut at = LEFT + each / 2.0;
        for (number, (group, bars)) in self.groups.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let begin = at;
            for (name, value) in bars {
                let (y, width) = (axis.y(*value), each * 0.8);
                let height = HEIGHT - BOTTOM - y;
                let _ = write!(
                    out,
                    "<rect x=\"{at:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
                );
                let (middle, above, below) = (at + width / 2.0, y - 3.0, HEIGHT - BOTTOM + 14.0);
                let _ = write!(
                    out,
                    "<text x=\"{middle:.1}\" y=\"{above:.1}\" text-anchor=\"middle\">{}</text>",
                    short(*value)
                );
                let name = super::escape(name);
                let _ = write!(out, "<text x=\"{middle:.1}\" y=\"{below}\" text-anchor=\"middle\">{name}</text>");
                at += each;
            }
            let (middle, y) = (f64::midpoint(begin, at), HEIGHT - 8.0);
            let group = super::escape(group);
            let _ = write!(
                out,
                "<text x=\"{middle:.1}\" y=\"{y}\" text-anchor=\"middle\" style=\"fill:{colour}\">{group}</text>"
            );
            at += each;
        }
        out.push_str("</svg>");
        out
    }
}

/// A number for people: thousands apart, no more digits than say something.
pub(super) fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        0.0 => 0,
        _ => 3,
    };
    apart(&format!("{value:.digits$}"))
}

/// What is counted, thousands apart.
pub(super) fn whole(value: u64) -> String {
    apart(&value.to_string())
}

fn apart(text: &str) -> String {
    let (whole, part) = text.split_once('.').map_or((text, None), |(whole, part)| (whole, Some(part)));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut apart = String::from(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            apart.push(',');
        }
        apart.push(digit);
    }
    part.map(|part| format!("{apart}.{part}")).unwrap_or(apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_say_something() {
        let shown: Vec<String> = [1_234_567.8, 12.34, 0.1234, 0.0, -1000.0].into_iter().map(short).collect();
        assert_eq!(shown, ["1,234,568", "12.3", "0.123", "0", "-1,000"]);
    }

    #[test]
    fn a_logarithmic_axis_puts_equal_factors_equally_far() {
        let axis = Axis::of([1.0, 10.0, 100.0].into_iter(), true);
        assert!((axis.share(10.0) - 0.5).abs() < 1e-9);
        assert_eq!((axis.share(0.0), axis.share(1000.0)), (0.0, 1.0));
    }
}
