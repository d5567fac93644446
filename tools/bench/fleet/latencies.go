package main

import (
	"math"
	"slices"
	"time"
)

// latencies are those of one kind of call.
type latencies struct {
	took   []time.Duration
	failed int
}

func (l *latencies) add(took time.Duration) { l.took = append(l.took, took) }

// addFailure counts a call as having taken its whole deadline: to be refused quickly is no merit.
func (l *latencies) addFailure(deadline time.Duration) {
	l.failed++
	l.add(deadline)
}

// summary is what the result says of them, in milliseconds.
type summary struct {
	Calls  int     `json:"calls"`
	Failed int     `json:"failed"`
	P50    float64 `json:"p50_ms"`
	P99    float64 `json:"p99_ms"`
	Max    float64 `json:"max_ms"`
}

func (l *latencies) summarise() summary {
	slices.Sort(l.took)
	return summary{len(l.took), l.failed, l.percentile(0.50), l.percentile(0.99), l.percentile(1)}
}

// percentile is by the nearest rank, of sorted values; 0 without any.
func (l *latencies) percentile(fraction float64) float64 {
	if len(l.took) == 0 {
		return 0
	}
	rank := int(math.Ceil(fraction*float64(len(l.took)))) - 1
	return float64(l.took[max(rank, 0)]) / float64(time.Millisecond)
}
