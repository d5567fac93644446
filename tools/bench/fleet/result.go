package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
)

// result is what is printed at the end, as JSON or as lines.
type result struct {
	How       string           `json:"how"`
	Clients   int              `json:"clients"`
	Files     int              `json:"files"`
	Size      int              `json:"size"`
	Wanted    int64            `json:"wanted"`
	Stored    int64            `json:"stored"`
	Failed    int64            `json:"failed"`
	Cancelled int64            `json:"cancelled"`
	Tries     int64            `json:"tries"`
	Queries   int64            `json:"queries"`
	Seconds   float64          `json:"seconds"`
	PerSecond float64          `json:"per_second"`
	Causes    map[string]int64 `json:"causes"`
	Sample    string           `json:"sample"`
	calmResult
}

func newResult(o options, t *tally, calm calmResult, took time.Duration) result {
	return result{
		How: o.how, Clients: o.clients, Files: o.files, Size: o.size,
		Wanted: int64(o.clients) * int64(o.files),
		Stored: t.done.Load(), Failed: t.failed.Load(), Cancelled: t.cancelled.Load(),
		Tries: t.tries.Load(), Queries: t.queries.Load(),
		Seconds: took.Seconds(), PerSecond: float64(t.done.Load()) / took.Seconds(),
		Causes: t.causes, Sample: t.sample,
		calmResult: calm,
	}
}

func (r result) writeJSON(output io.Writer) error { return json.NewEncoder(output).Encode(r) }

func (r result) writeText(output io.Writer) {
	fmt.Fprintf(output, "%s, %d × %d of %d B: %d of %d in %.1f s (%.0f/s); %d failed, %d cancelled, %d tries, %d status queries\n",
		r.How, r.Clients, r.Files, r.Size, r.Stored, r.Wanted, r.Seconds, r.PerSecond, r.Failed, r.Cancelled, r.Tries, r.Queries)
	if len(r.Causes) > 0 {
		fmt.Fprintf(output, "failed tries: %v, such as: %s\n", r.Causes, strings.TrimSpace(r.Sample))
	}
	for _, name := range []string{"GetCapabilities", "GetActionResult", "Read", "health", "all"} {
		if s, measured := r.Calm[name]; measured {
			fmt.Fprintf(output, "calm client, %s: p50 %.1f ms, p99 %.1f, max %.1f; %d calls, %d failed\n",
				name, s.P50, s.P99, s.Max, s.Calls, s.Failed)
		}
	}
}
