//! The plots as a viewer sees them: well-formed, complete, and legible.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use evaluate::curves::{Series, curves_svg};
use evaluate::frontier::{Metrics, Point, Target, frontier_svg, table};
use evaluate::panels::{Bar, Panel, panels_svg};

const METRICS: Metrics<'_> = Metrics { reward: "reward E[r*]", safety: "safety E[g*]" };

fn point(name: &str, step: &str, beta_over_lambda: Option<f64>, reward: f64, safety: f64) -> Point {
    Point { name: name.into(), step: step.into(), beta_over_lambda, reward, safety, ..Point::default() }
}

/// A chain with a sweep, some policies of which lie close together.
fn chain() -> Vec<Point> {
    vec![
        point("base", "base", None, -0.12, 0.31),
        point("helpfulness", "helpfulness", None, 0.85, -0.42),
        point("harmlessness-1", "harmlessness", Some(1.0), 0.78, 0.05),
        point("harmlessness-0.05", "harmlessness", Some(0.05), 0.59, 0.74),
        point("harmlessness-0.5", "harmlessness", Some(0.5), 0.70, 0.41),
        point("harmlessness-0.25", "harmlessness", Some(0.25), 0.66, 0.62),
        point("harmlessness-0.1", "harmlessness", Some(0.1), 0.60, 0.72),
        point("merge-0.5", "merge", None, 0.71, 0.40),
    ]
}

/// A text of the picture: its content and its rectangle by a usual font's average width.
struct Label {
    text: String,
    rect: [f64; 4],
}

/// The unrotated texts of an SVG, which must be well-formed.
fn labels(svg: &str) -> (Vec<Label>, [f64; 2]) {
    let document = roxmltree::Document::parse(svg).unwrap_or_else(|error| panic!("{error}\n{svg}"));
    let root = document.root_element();
    let number = |node: roxmltree::Node<'_, '_>, name: &str| node.attribute(name).unwrap().parse::<f64>().unwrap();
    let texts = root.descendants().filter(|n| n.has_tag_name("text") && n.attribute("transform").is_none());
    let labels = texts.map(|node| {
        let text = node.text().unwrap_or_default().trim().to_string();
        let size = number(node, "font-size");
        let width = 0.55 * size * text.chars().count() as f64;
        let (x, y) = (number(node, "x"), number(node, "y"));
        let left = match node.attribute("text-anchor") {
            Some("start") => x,
            Some("end") => x - width,
            _ => x - width / 2.0,
        };
        // for texts set on the middle of their height
        Label { text, rect: [left, y - size / 2.0, left + width, y + size / 2.0] }
    });
    (labels.collect(), [number(root, "width"), number(root, "height")])
}

/// Fails if two texts of the picture overlap, or one is cut off.
fn assert_legible(svg: &str) {
    let (labels, [width, height]) = labels(svg);
    for (i, Label { text, rect }) in labels.iter().enumerate() {
        let inside = rect[0] >= 0.0 && rect[1] >= 0.0 && rect[2] <= width && rect[3] <= height;
        assert!(inside, "{text:?} is cut off: {rect:?} in {width}×{height}");
        for other in &labels[..i] {
            let apart = rect[2] <= other.rect[0]
                || other.rect[2] <= rect[0]
                || rect[3] <= other.rect[1]
                || other.rect[3] <= rect[1];
            assert!(apart, "{text:?} and {:?} overlap", other.text);
        }
    }
}

/// How many texts of the picture say exactly `text`.
fn count(svg: &str, text: &str) -> usize {
    labels(svg).0.iter().filter(|label| label.text == text).count()
}

#[test]
fn every_policy_is_labelled_and_legible() {
    let svg = frontier_svg("Reward and safety", METRICS, &chain(), Target::default()).unwrap();
    assert_legible(&svg);
    for p in chain() {
        let in_legend = usize::from(p.name == p.step);
        assert_eq!(count(&svg, &p.name), 1 + in_legend, "{}", p.name);
    }
    for text in ["Reward and safety", "harmlessness", "merge", METRICS.reward] {
        assert_eq!(count(&svg, text), 1, "{text}");
    }
    assert!(svg.contains(METRICS.safety), "the vertical axis, whose name is rotated");
    assert!(svg.contains(r##"fill="#FFFFFF""##), "a white ground, for dark viewers");
}

#[test]
fn a_row_of_near_policies_is_legible() {
    let row: Vec<Point> =
        (0..8).map(|i| point(&format!("policy-number-{i}"), "s", None, 3.0 + 1e-3 * f64::from(i), 3.0)).collect();
    assert_legible(&frontier_svg("Near", METRICS, &row, Target::default()).unwrap());
    let wide: Vec<Point> = row.iter().map(|p| Point { reward: (p.reward - 3.0) * 1e17, ..p.clone() }).collect();
    assert_legible(&frontier_svg("Large numbers", METRICS, &wide, Target::default()).unwrap());
    let small: Vec<Point> = row.iter().map(|p| Point { reward: (p.reward - 3.0) * 1e-5, ..p.clone() }).collect();
    assert_legible(&frontier_svg("Small numbers", METRICS, &small, Target::default()).unwrap());
}

#[test]
fn the_sweep_is_a_line_in_the_order_of_its_values() {
    let svg = frontier_svg("t", METRICS, &chain(), Target::default()).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let lines: Vec<Vec<(f64, f64)>> = document
        .descendants()
        .filter_map(|node| node.attribute("points").filter(|_| node.has_tag_name("polyline")))
        .map(|points| {
            let pairs = points.split_whitespace().map(|pair| pair.split_once(',').unwrap());
            pairs.map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
        })
        .collect();
    let sweep = lines.iter().find(|line| line.len() == 5).expect("the line through five policies");
    assert!(sweep.windows(2).all(|ends| ends[0].0 < ends[1].0), "rising reward with rising β/λ: {sweep:?}");
    assert!(sweep.windows(2).all(|ends| ends[0].1 < ends[1].1), "falling safety, downwards: {sweep:?}");
}

#[test]
fn names_are_escaped_and_cut() {
    let names = ["<b>&\"'</b>", "bell\u{7}\nnull\0", "𝛑 → safe", &"long ".repeat(20)];
    let points: Vec<Point> = names.iter().map(|name| point(name, name, None, 0.5, name.len() as f64)).collect();
    let svg = frontier_svg("<title> & more", METRICS, &points, Target::default()).unwrap();
    assert_legible(&svg);
    assert_eq!(count(&svg, "<title> & more"), 1);
    assert_eq!(count(&svg, names[0]), 2, "beside its mark and in the legend");
    assert_eq!(count(&svg, "bell\u{fffd}\u{fffd}null\u{fffd}"), 2);
    assert_eq!(count(&svg, names[2]), 2);
    assert_eq!(labels(&svg).0.iter().filter(|l| l.text.starts_with("long long") && l.text.ends_with('…')).count(), 2);
}

#[test]
fn degenerate_inputs() {
    for value in [0.0, -0.0, 5.0, -1e-9, 1e-300, 1e15] {
        let one = [point("only", "base", None, value, value)];
        assert_legible(&frontier_svg("one", METRICS, &one, Target::default()).unwrap());
        let same: Vec<Point> =
            (0..4).map(|i| point(&format!("same-{i}"), "s", Some(f64::from(i)), value, value)).collect();
        assert_legible(&frontier_svg("equal", METRICS, &same, Target::default()).unwrap());
    }
    let hair = [point("a", "s", None, 1.0, 0.0), point("b", "s", None, 1.0 + f64::EPSILON, 1e15)];
    assert_legible(&frontier_svg("a hair apart", METRICS, &hair, Target::default()).unwrap());
    let many: Vec<Point> =
        (0..60).map(|i| point(&format!("p{i}"), &format!("s{i}"), None, f64::from(i % 8), f64::from(i / 8))).collect();
    assert_legible(&frontier_svg("many", METRICS, &many, Target::default()).unwrap());
    assert!(frontier_svg("none", METRICS, &[], Target::default()).is_err());
}

/// Sets one number of a point.
type Set = fn(&mut Point, f64);

/// What viewers are told who point at a mark.
fn tips(svg: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).unwrap();
    let circles = document.descendants().filter(|node| node.attribute("class") == Some("tip"));
    circles.map(|circle| circle.first_element_child().unwrap().text().unwrap().to_owned()).collect()
}

/// How many elements of the picture have this attribute.
fn with(svg: &str, name: &str, value: &str) -> usize {
    let document = roxmltree::Document::parse(svg).unwrap();
    document.descendants().filter(|node| node.attribute(name) == Some(value)).count()
}

#[test]
fn intervals_target_and_tips_are_drawn() {
    let mut points = chain();
    let plain = frontier_svg("t", METRICS, &points, Target::default()).unwrap();
    points[2].reward_interval = Some([-2.0, 3.0]);
    points[2].safety_interval = Some([0.0, 0.1]);
    points[7].q = Some(0.5);
    points[7].name = "<merge> & half".into();
    let target = Target { at_least: Some(1.5), policy: Some("harmlessness-1") };
    let svg = frontier_svg("t", METRICS, &points, target).unwrap();
    assert_legible(&svg);
    let thin = |svg: &str| with(svg, "opacity", "0.5");
    assert_eq!((thin(&plain), thin(&svg)), (0, 2), "two intervals");
    assert_eq!((with(&plain, "r", "11"), with(&svg, "r", "11")), (0, 1), "one ring");
    assert_eq!((count(&plain, "at least 1.5"), count(&svg, "at least 1.5")), (0, 1));
    // the axes reach as far as intervals and threshold
    assert!(["-2", "3"].iter().all(|value| count(&svg, value) == 1), "{svg}");
    let tips = tips(&svg);
    assert_eq!(tips.len(), points.len());
    assert_eq!(
        tips[2],
        "harmlessness-1, β/λ = 1; reward E[r*] 0.780 (-2.000 to 3.000); safety E[g*] 0.050 (0.000 to 0.100)"
    );
    assert_eq!(tips[7], "<merge> & half, q = 0.5; reward E[r*] 0.710; safety E[g*] 0.400");
    points[2].safety_interval = Some([0.0, f64::NAN]);
    let message = frontier_svg("t", METRICS, &points, target).unwrap_err().to_string();
    assert!(message.contains("`harmlessness-1`") && message.contains("interval of the safety"), "{message}");
    let far = Target { at_least: Some(f64::INFINITY), policy: None };
    assert!(frontier_svg("t", METRICS, &chain(), far).is_err());
}

#[test]
fn panels_have_a_bar_for_every_policy_and_category() {
    let policies: Vec<String> = (0..20).map(|number| format!("policy-{number}")).collect();
    let bar = |value: f64| Some(Bar { value, interval: Some([value * 0.5, value * 0.5 + 50.0]), n: 12 });
    let panel = |name: &str| Panel { name: name.into(), bars: (0..20).map(|i| bar(f64::from(i) * 5.0)).collect() };
    let names = ["cooking", "crime & <b>", "a category with a long name indeed", "history", "law"];
    let mut panels: Vec<Panel> = names.map(panel).to_vec();
    panels[1].bars[3] = None;
    let svg = panels_svg("Win rates", &policies, &panels).unwrap();
    assert_legible(&svg);
    assert_eq!(tips(&svg).len(), 99, "one has no verdicts");
    assert_eq!(tips(&svg)[2], "policy-2 in cooking: 10.0 % (5.0 to 55.0), 12 verdicts");
    assert_eq!(count(&svg, "policy-19"), 2, "in each row of panels");
    assert_eq!(count(&svg, "crime & <b>"), 1);
    assert_legible(
        &panels_svg(&"long ".repeat(9), &policies[..1], &[Panel { name: "a".into(), bars: vec![bar(0.0)] }]).unwrap(),
    );
    assert!(panels_svg("t", &policies, &[]).is_err() && panels_svg("t", &[], &panels).is_err());
    assert!(panels_svg("t", &policies[..2], &panels).unwrap_err().to_string().contains("`cooking`"));
    panels[4].bars[0] = bar(101.0);
    assert!(panels_svg("t", &policies, &panels).unwrap_err().to_string().contains("`law`"));
}

#[test]
fn numbers_that_are_none_are_named() {
    let huge = [point("far", "base", None, 1e300, 0.0)];
    let message = frontier_svg("t", METRICS, &huge, Target::default()).unwrap_err().to_string();
    assert!(message.contains("1e300") && message.contains(METRICS.reward), "{message}");
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let broken: [(&str, Set); 4] = [
            ("reward", |p, v| p.reward = v),
            ("safety", |p, v| p.safety = v),
            ("β/λ", |p, v| p.beta_over_lambda = Some(v)),
            ("KL", |p, v| p.kl = Some(v)),
        ];
        for (what, set) in broken {
            let mut points = chain();
            set(&mut points[5], bad);
            for result in [frontier_svg("t", METRICS, &points, Target::default()), table(METRICS, &points)] {
                let message = result.unwrap_err().to_string();
                assert!(message.contains("`harmlessness-0.25`") && message.contains(what), "{message}");
                assert!(message.contains(&bad.to_string()), "{message}");
            }
        }
    }
}

#[test]
fn the_table_is_markdown_and_aligned() {
    let mut points = chain();
    points.truncate(3);
    points[0].reward = -0.0001;
    points[1].name = "a|b".into();
    assert_eq!(
        table(METRICS, &points).unwrap(),
        "\
| policy         | step         | β/λ | reward E[r*] | safety E[g*] |
| -------------- | ------------ | --: | -----------: | -----------: |
| base           | base         |   – |        0.000 |        0.310 |
| a\\|b           | helpfulness  |   – |        0.850 |       -0.420 |
| harmlessness-1 | harmlessness |   1 |        0.780 |        0.050 |
"
    );
    points[2].kl = Some(1.5);
    let with_kl = table(METRICS, &points).unwrap();
    assert!(with_kl.lines().next().unwrap().ends_with("|    KL |"), "{with_kl}");
    assert!(with_kl.ends_with("| 1.500 |\n"), "{with_kl}");
}

#[test]
fn curves_show_every_run() {
    let loss = |run: u64| (1..=60).map(|step| (step, 0.69 - 0.002 * (step * (run + 1)) as f64)).collect();
    let names = ["helpfulness", "harmlessness-0.1", "harmlessness-0.05 <&>"];
    let series: Vec<Series> =
        names.iter().zip(0..).map(|(name, run)| Series { name: (*name).into(), points: loss(run) }).collect();
    let svg = curves_svg("Training loss", "loss", &series).unwrap();
    assert_legible(&svg);
    for name in names {
        assert_eq!(count(&svg, name), 1, "{name}");
    }
    assert_eq!(count(&svg, "step"), 1);
    let document = roxmltree::Document::parse(&svg).unwrap();
    let lengths: Vec<usize> = document
        .descendants()
        .filter(|node| node.has_tag_name("polyline"))
        .map(|node| node.attribute("points").unwrap().split_whitespace().count())
        .collect();
    assert_eq!(lengths.iter().filter(|length| **length == 60).count(), 3, "{lengths:?}");
}

#[test]
fn curves_of_short_and_broken_runs() {
    let one = |name: &str, points: Vec<(u64, f64)>| Series { name: name.into(), points };
    for points in
        [vec![(0, 0.0)], vec![(1, 0.5)], vec![(0, 0.0), (1, 0.0)], vec![(1, 0.0), (3, 3e-4)], vec![(u64::MAX, 1.0)]]
    {
        let series = [one("short", points), one("empty", vec![])];
        assert_legible(&curves_svg("Margins", "rewards/margins", &series).unwrap());
    }
    let whole: Vec<String> = labels(&curves_svg("t", "loss", &[one("a", vec![(1, 0.1), (2, 0.7)])]).unwrap())
        .0
        .into_iter()
        .map(|l| l.text)
        .collect();
    assert!(["0", "1", "2"].iter().all(|step| whole.iter().any(|text| text == step)), "{whole:?}");
    assert!(!whole.contains(&"1.5".to_string()), "no half steps: {whole:?}");
    let message = curves_svg("t", "loss", &[one("bad", vec![(1, 0.1), (2, f64::NAN)])]).unwrap_err().to_string();
    assert!(message.contains("`bad`") && message.contains("step 2") && message.contains("NaN"), "{message}");
    assert!(curves_svg("t", "loss", &[one("bad", vec![])]).is_err());
    assert!(curves_svg("t", "loss", &[]).is_err());
}
