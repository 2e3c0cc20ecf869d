//! `ownership-model check`, `refute NAME`, `refute-all`: explores the model and prints what it found.

use std::process::ExitCode;

use ownership_model::model::Ownership;
use ownership_model::rules::{Bounds, Grain, LeaveOut, Rules};
use ownership_model::schedule;
use ownership_model::search::{Limits, Order, Report, search};

const USAGE: &str = "\
usage: ownership-model check | refute NAME | refute-all
  --depth N     stop at N steps; searches breadth-first
  --states N    stop after N generated states
  --bounds claims,messages,batch_rows,releases,raises,retries,recoveries
                default 3,3,2,1,1,1,1
  --fine        every arrival and every half of a read is a step of its own
names: ";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match Options::parse(&arguments) {
        Ok(options) => run(&options),
        Err(problem) => {
            let names: Vec<_> = LeaveOut::ALL.iter().map(|leave_out| leave_out.name()).collect();
            eprintln!("{problem}\n{USAGE}{}", names.join(" "));
            ExitCode::from(2)
        }
    }
}

enum Command {
    Check,
    Refute(Vec<LeaveOut>),
}

struct Options {
    command: Command,
    bounds: Bounds,
    grain: Grain,
    limits: Limits,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut arguments = arguments.iter().map(String::as_str);
        let command = match arguments.next() {
            Some("check") => Command::Check,
            Some("refute-all") => Command::Refute(LeaveOut::ALL.to_vec()),
            Some("refute") => {
                let name = arguments.next().ok_or("refute needs the name of a rule")?;
                Command::Refute(vec![LeaveOut::parse(name).ok_or_else(|| format!("no rule is named {name}"))?])
            }
            _ => return Err("what is to be done?".to_owned()),
        };
        let mut options = Self { command, bounds: Bounds::REQUIRED, grain: Grain::Coarse, limits: Limits::NONE };
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value"));
            match name {
                "--fine" => options.grain = Grain::Fine,
                "--bounds" => options.bounds = value()?.parse()?,
                "--depth" => options.limits.depth = Some(number(name, value()?)?),
                "--states" => options.limits.states = Some(number(name, value()?)?),
                _ => return Err(format!("{name} is no option")),
            }
        }
        Ok(options)
    }
}

fn number(name: &str, value: &str) -> Result<usize, String> {
    value.parse().ok().filter(|number| *number > 0).ok_or_else(|| format!("{name} {value} is no positive number"))
}

fn run(options: &Options) -> ExitCode {
    match &options.command {
        Command::Check => {
            println!("protocol, {}", options.bounds);
            let order = if options.limits.depth.is_some() { Order::BreadthFirst } else { Order::DepthFirst };
            let report = explore(options, Rules::all(), order);
            if report.counterexample.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Command::Refute(leave_outs) => {
            let mut is_each_refuted = true;
            for leave_out in leave_outs {
                println!("without {leave_out} ({}), {}", leave_out.meaning(), options.bounds);
                let report = explore(options, Rules::without(*leave_out), Order::BreadthFirst);
                is_each_refuted &= report.counterexample.is_some();
            }
            if is_each_refuted { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn explore(options: &Options, rules: Rules, order: Order) -> Report {
    let model = Ownership { rules, bounds: options.bounds, grain: options.grain };
    let report = search(model, order, options.limits, rules == Rules::all());
    println!("{report}");
    if let Some(counterexample) = &report.counterexample {
        println!("{}", schedule::render(counterexample));
    }
    report
}
