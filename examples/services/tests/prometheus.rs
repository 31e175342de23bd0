//! The service `prometheus`, scraped as Prometheus would.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// The running service, which is killed when it is dropped. Its workers end with it.
struct Front {
    child: Child,
    served: String,
    scraped: String,
}

/// The values of a scrape by name and labels, and the kinds by name.
struct Scrape {
    values: BTreeMap<String, f64>,
    kinds: BTreeMap<String, String>,
}

impl Front {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prometheus"));
        command.args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut address = || {
            let line = lines.next().unwrap().unwrap();
            line.split_once("http://").unwrap().1.split('/').next().unwrap().to_owned()
        };
        let (scraped, served) = (address(), address());
        Self { child, served, scraped }
    }

    /// Sends a request. Returns the process that answers, or `None` if the connection is cut.
    fn request(&self) -> Option<u32> {
        get(&self.served, "/").trim().parse().ok()
    }

    fn scrape(&self) -> Scrape {
        let (mut values, mut kinds) = (BTreeMap::new(), BTreeMap::new());
        let mut described = BTreeSet::new();
        for line in get(&self.scraped, "/metrics").lines().filter(|line| !line.is_empty()) {
            if let Some(text) = line.strip_prefix("# HELP ") {
                described.insert(text.split_once(' ').expect("a meaning").0.to_owned());
            } else if let Some(text) = line.strip_prefix("# TYPE ") {
                let (name, kind) = text.split_once(' ').expect("a kind");
                kinds.insert(name.to_owned(), kind.to_owned());
            } else {
                let (name, value) = line.rsplit_once(' ').expect("a value");
                values.insert(name.to_owned(), value.parse().expect("a number"));
            }
        }
        assert!(kinds.keys().all(|name| described.contains(name)), "{kinds:?} {described:?}");
        Scrape { values, kinds }
    }

    /// Scrapes until the condition holds. Checks that no counter falls meanwhile.
    fn until(&self, is_so: impl Fn(&Scrape) -> bool) -> Scrape {
        let mut before = self.scrape();
        for _ in 0..3000 {
            let scrape = self.scrape();
            for (name, value) in &before.values {
                let is_counter = name.contains("_total{") || name.contains("_bucket{");
                assert!(!is_counter || scrape.values[name] >= *value, "{name} has fallen");
            }
            if is_so(&scrape) {
                return scrape;
            }
            before = scrape;
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the condition still does not hold: {:#?}", before.values);
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the body of the answer, or an empty text if the connection is cut.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let _ = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
    answer.split_once("\r\n\r\n").map_or_else(String::new, |(head, body)| {
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        body.to_owned()
    })
}

impl Scrape {
    fn value(&self, name: &str) -> f64 {
        *self.values.get(name).unwrap_or_else(|| panic!("no {name} in {:#?}", self.values))
    }

    /// Returns the sum over the two slots.
    fn of_workers(&self, name: &str) -> f64 {
        let of_slot =
            |slot| self.value(&format!("{name}{{dispatcher=\"web\",group=\"\",slot=\"{slot}\"}}"));
        of_slot(1) + of_slot(2)
    }
}

#[test]
fn a_scrape_shows_the_connections_of_the_workers_and_that_one_was_started_again() {
    // Both workers answer requests.
    const REQUESTS: u32 = 20;
    let front = Front::start();
    let all = "{dispatcher=\"web\"}";
    front.until(|it| {
        it.values.get("fdwire_dispatcher_workers{dispatcher=\"web\",state=\"ready\"}") == Some(&2.0)
    });
    let processes: BTreeSet<_> = (0..REQUESTS).map(|_| front.request().unwrap()).collect();
    assert_eq!(processes.len(), 2);

    // The scrape counts each of them.
    let adopted = format!("fdwire_dispatcher_adopted_connections_total{all}");
    let scrape = front.until(|it| {
        it.value(&adopted) == f64::from(REQUESTS)
            && it.of_workers("fdwire_worker_active_connections") == 0.0
    });
    let requests = f64::from(REQUESTS);
    assert_eq!(scrape.of_workers("fdwire_worker_adopted_connections_total"), requests);
    assert_eq!(scrape.value(&format!("fdwire_dispatcher_adoption_seconds_count{all}")), requests);
    let bucket = "fdwire_dispatcher_adoption_seconds_bucket{dispatcher=\"web\",le=\"+Inf\"}";
    assert_eq!(scrape.value(bucket), requests);
    assert_eq!(scrape.kinds["fdwire_dispatcher_adoption_seconds"], "histogram");
    assert_eq!(scrape.kinds["fdwire_dispatcher_adopted_connections_total"], "counter");
    assert_eq!(scrape.kinds["fdwire_worker_active_connections"], "gauge");

    // A worker that is killed and started again keeps its counters.
    let victim = processes.first().unwrap().to_string();
    assert!(Command::new("kill").args(["-KILL", &victim]).status().unwrap().success());
    let after = front.until(|it| it.of_workers("fdwire_worker_restarts_total") == 1.0);
    let ended = "fdwire_dispatcher_retired_workers_total{dispatcher=\"web\",cause=\"ended\"}";
    assert_eq!(after.value(ended), 1.0);
    assert_eq!(after.of_workers("fdwire_worker_adopted_connections_total"), requests);
    let names = |scrape: &Scrape| Vec::from_iter(scrape.values.keys().cloned());
    assert_eq!(names(&after), names(&scrape), "a worker that is started again adds no series");
}
