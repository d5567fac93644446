package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const progressEvery = 5 * time.Second

// tally counts what all clients did: blobs done, failed for good and
// cancelled; tries and status queries are calls.
type tally struct {
	done, failed, cancelled, tries, queries atomic.Int64

	mutex  sync.Mutex
	causes map[string]int64
	sample string
}

func newTally() *tally { return &tally{causes: map[string]int64{}} }

// note counts a failed try by its cause.
func (t *tally) note(err error) {
	cause := status.Code(err).String()
	if errors.Is(err, context.DeadlineExceeded) {
		cause = codes.DeadlineExceeded.String()
	}
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.causes[cause]++
	t.sample = err.Error()
}

// show prints a line every five seconds until the context ends.
func (t *tally) show(ctx context.Context, began time.Time) {
	ticker := time.NewTicker(progressEvery)
	defer ticker.Stop()
	before := int64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		done := t.done.Load()
		fmt.Fprintf(os.Stderr, "%4.0f s: %d done (%d/s), %d failed, %d cancelled, %d tries, %d status queries\n",
			time.Since(began).Seconds(), done, (done-before)/int64(progressEvery/time.Second),
			t.failed.Load(), t.cancelled.Load(), t.tries.Load(), t.queries.Load())
		before = done
	}
}
