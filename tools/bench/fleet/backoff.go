package main

import (
	"context"
	"math/rand/v2"
	"time"
)

// Bazel's: --remote_retry_max_delay is 5 s, the jitter a tenth each way.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
	jitter       = 0.1
)

// backoff is the growing pause between the tries of one call.
type backoff struct{ next time.Duration }

func newBackoff() *backoff { return &backoff{firstPause} }

// wait pauses before the next try; false if the time is up.
func (b *backoff) wait(ctx context.Context) bool {
	factor := 1 - jitter + 2*jitter*rand.Float64()
	pause := time.NewTimer(time.Duration(float64(b.next) * factor))
	defer pause.Stop()
	b.next = min(2*b.next, longestPause)
	select {
	case <-pause.C:
		return true
	case <-ctx.Done():
		return false
	}
}
